"""LayerNorm of rows on the GPU, as ``kernels/ops.py`` calls it.

A program keeps some whole rows in registers, so that they are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.launch.real_rows_triton import real_rows
from fisedit_compile.kernels.launch.triton_launch import check_dtypes, launch

_ROW_VALUES = 4096  # that a program keeps in registers


@triton.jit
def normalised(x, c, weight, bias, eps, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """The layer norm of rows x, fp32 [BM, BC], whose columns c [BC] from C on are zero."""
    centred = tl.where((c < C)[None, :], x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)[:, None]
    if weight is not None:
        y *= tl.load(weight + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        y += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return y


@triton.jit(do_not_specialize=["padded"])
def _layer_norm_rows_kernel(
    rows: tl.tensor,  # [padded, C]
    weight: tl.tensor,  # [C] or None
    bias: tl.tensor,  # [C] or None
    count: tl.tensor,  # int32 [1] or None: how many of the rows are real
    out: tl.tensor,  # [padded, C]
    padded: tl.tensor,  # how many rows there are, those of padding included
    eps: tl.tensor,
    C: tl.constexpr,
    BM: tl.constexpr,
    BC: tl.constexpr,  # C, rounded up to a power of two
) -> None:
    first = tl.program_id(0) * BM
    real = real_rows(padded, count)
    if first >= real:
        return
    m = first + tl.arange(0, BM)  # [BM]
    c = tl.arange(0, BC)  # [BC]
    inside = (m < real)[:, None] & (c < C)[None, :]
    at = m.to(tl.int64)[:, None] * C + c[None, :]  # [BM, BC]
    x = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
    y = normalised(x, c, weight, bias, eps, C)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def layer_norm_rows_triton(
    rows: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """``layer_norm_rows`` on one GPU; its reference describes the arguments.

    Raises:
        ValueError: the kernel does not take the dtype.
    """
    check_dtypes("layer_norm_rows", rows)
    rows = rows.contiguous()
    out = torch.empty_like(rows)
    if out.numel() == 0:
        return out
    padded, channels = rows.shape
    width = triton.next_power_of_2(channels)
    height = max(1, _ROW_VALUES // width)
    launch(_layer_norm_rows_kernel, (triton.cdiv(padded, height),), rows)(
        rows,
        weight,
        bias,
        count,
        out,
        padded,
        eps,
        C=channels,
        BM=height,
        BC=width,
        num_warps=4,
    )
    return out
