"""Leaving the sparse region on the GPU, as ``kernels/ops.py`` calls it: a copy of the base with the real rows in it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from fisedit_compile.ir.layout import inverse_permutation
from fisedit_compile.kernels.launch.real_rows_triton import real_rows
from fisedit_compile.kernels.launch.triton_launch import POINTWISE_VALUES, launch


@triton.jit(do_not_specialize=["padded"])
def _scatter_rows_kernel(
    rows: tl.tensor,  # [padded, width]
    index: tl.tensor,  # int64 [padded]
    count: tl.tensor,  # int32 [1] or None: how many of the rows are real
    out: tl.tensor,  # [pixels, width]
    padded: tl.tensor,  # how many rows there are, those of padding included
    width: tl.tensor,
    BM: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    real = real_rows(padded, count)
    if tl.program_id(0) * BM >= real:
        return
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    inside = (m < real)[:, None] & (c < width)[None, :]
    pixel = tl.load(index + m, mask=m < real, other=0)
    x = tl.load(rows + m.to(tl.int64)[:, None] * width + c[None, :], mask=inside, other=0.0)
    tl.store(out + pixel[:, None] * width + c[None, :], x, mask=inside)


def scatter_rows_triton(
    rows: torch.Tensor,
    base: torch.Tensor,
    index: torch.Tensor,
    shape: Sequence[int],
    order: Sequence[int],
    pixel_dims: int,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """``scatter_rows`` on one GPU; its reference describes the arguments and the result.

    Raises:
        RuntimeError: the dtypes of rows and base differ.
    """
    if rows.dtype != base.dtype:
        raise RuntimeError(f"scatter_rows: rows of {rows.dtype} into a base of {base.dtype}; give one dtype")
    out = base.clone(memory_format=torch.contiguous_format)
    padded, width = rows.shape[0], math.prod(rows.shape[1:])
    if rows.numel():
        block = min(256, max(16, triton.next_power_of_2(width)))
        height = POINTWISE_VALUES // block
        launch(_scatter_rows_kernel, (triton.cdiv(padded, height), triton.cdiv(width, block)), rows)(
            rows.contiguous(),
            index.contiguous(),
            count,
            out,
            padded,
            width,
            BM=height,
            BC=block,
            num_warps=4,
        )
    return out.view([shape[dim] for dim in order]).permute(inverse_permutation(order))
