"""GroupNorm of rows with a given scale and shift on the GPU, as ``kernels/ops.py`` calls it: one pass over the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.launch.real_rows_triton import real_rows
from fisedit_compile.kernels.launch.triton_launch import POINTWISE_VALUES, check_dtypes, launch


@triton.jit(do_not_specialize=["padded"])
def _group_norm_rows_kernel(
    rows: tl.tensor,  # [padded, channels]
    sample: tl.tensor,  # int64 [padded]
    scale: tl.tensor,  # fp32 [B, channels]
    shift: tl.tensor,  # fp32 [B, channels]
    count: tl.tensor,  # int32 [1] or None: how many of the rows are real
    out: tl.tensor,  # [padded, channels]
    padded: tl.tensor,  # how many rows there are, those of padding included
    channels: tl.tensor,
    BM: tl.constexpr,
    BC: tl.constexpr,
    SILU: tl.constexpr,
) -> None:
    real = real_rows(padded, count)
    if tl.program_id(0) * BM >= real:
        return
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    inside, valid = m < real, c < channels
    mask = inside[:, None] & valid[None, :]
    at = m.to(tl.int64)[:, None] * channels + c[None, :]  # [BM, BC]
    x = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)
    owner = tl.load(sample + m, mask=inside, other=0).to(tl.int32)
    of_sample = owner[:, None] * channels + c[None, :]  # [BM, BC]
    y = x * tl.load(scale + of_sample, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(shift + of_sample, mask=mask, other=0.0).to(tl.float32)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


def group_norm_rows_triton(
    rows: torch.Tensor,
    sample: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    silu: bool = False,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """``group_norm_rows`` on one GPU; its reference describes the arguments.

    Returns:
        [M, C] in the dtype of ``rows``, contiguous.

    Raises:
        ValueError: the kernel does not take the dtype, or scale or shift are not of the rows' width.
    """
    check_dtypes("group_norm_rows", rows)
    padded, channels = rows.shape
    if scale.shape[1] != channels or scale.shape != shift.shape:
        raise ValueError(
            f"group_norm_rows: {channels} channels, scale {list(scale.shape)}, shift {list(shift.shape)}; give both "
            f"[B, {channels}]"
        )
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    # The largest power of two that divides the channels, such as 64 of 320 and 512 of 2560: no thread is idle.
    block = max(16, min(512, channels & -channels))
    height = POINTWISE_VALUES // block
    launch(_group_norm_rows_kernel, (triton.cdiv(padded, height), triton.cdiv(channels, block)), rows)(
        rows.contiguous(),
        sample.contiguous(),
        scale.contiguous(),
        shift.contiguous(),
        count,
        out,
        padded,
        channels,
        BM=height,
        BC=block,
        SILU=silu,
        num_warps=4,
    )
    return out
