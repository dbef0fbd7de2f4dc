"""Rows of two values side by side and their group norm on the GPU, as ``kernels/ops.py`` calls it, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.launch.real_rows_triton import real_rows
from fisedit_compile.kernels.launch.triton_launch import POINTWISE_VALUES, check_dtypes, launch


@triton.jit(do_not_specialize=["padded"])
def _cat_norm_rows_kernel(
    left: tl.tensor,  # [padded, first]
    right: tl.tensor,  # [padded, channels - first]
    sample: tl.tensor,  # int64 [padded]
    scale: tl.tensor,  # fp32 [B, channels]
    shift: tl.tensor,  # fp32 [B, channels]
    count: tl.tensor,  # int32 [1] or None: how many of the rows are real
    joined: tl.tensor,  # [padded, channels]
    normed: tl.tensor,  # [padded, channels]
    padded: tl.tensor,  # how many rows there are, those of padding included
    first: tl.tensor,
    channels: tl.tensor,
    BM: tl.constexpr,
    BC: tl.constexpr,  # divides first and channels, so that a program reads one of the two values
    SILU: tl.constexpr,
) -> None:
    real = real_rows(padded, count)
    if tl.program_id(0) * BM >= real:
        return
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    c = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    inside = (m < real)[:, None]
    rows = m.to(tl.int64)[:, None]
    if tl.program_id(1) * BC < first:
        x = tl.load(left + rows * first + c[None, :], mask=inside, other=0.0)  # [BM, BC]
    else:
        x = tl.load(right + rows * (channels - first) + (c - first)[None, :], mask=inside, other=0.0)
    at = rows * channels + c[None, :]
    tl.store(joined + at, x, mask=inside)
    owner = tl.load(sample + m, mask=m < real, other=0).to(tl.int32)
    of_sample = owner[:, None] * channels + c[None, :]
    y = x.to(tl.float32) * tl.load(scale + of_sample).to(tl.float32) + tl.load(shift + of_sample).to(tl.float32)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=inside)


def cat_norm_rows_triton(
    left: torch.Tensor,
    right: torch.Tensor,
    sample: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    silu: bool = False,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cat_norm_rows`` on one GPU; its reference describes the arguments.

    Raises:
        ValueError: the dtypes differ or are none that the kernel takes, or scale or shift are not as wide as both.
    """
    check_dtypes("cat_norm_rows", left, right)
    padded, first = left.shape
    channels = first + right.shape[1]
    if scale.shape[1] != channels or shift.shape != scale.shape or right.shape[0] != padded:
        raise ValueError(
            f"cat_norm_rows: rows {list(left.shape)} and {list(right.shape)}, scale {list(scale.shape)}, shift "
            f"{list(shift.shape)}; give as many rows of both, and scale and shift [B, {channels}]"
        )
    joined, normed = (left.new_empty(padded, channels) for _ in range(2))
    if joined.numel() == 0:
        return joined, normed
    # The largest power of two, up to 512, that divides the width of the first value and that of both together.
    block = min(512, first & -first, channels & -channels)
    height = POINTWISE_VALUES // max(block, 16)
    launch(_cat_norm_rows_kernel, (triton.cdiv(padded, height), channels // block), left)(
        left.contiguous(),
        right.contiguous(),
        sample.contiguous(),
        scale.contiguous(),
        shift.contiguous(),
        count,
        joined,
        normed,
        padded,
        first,
        channels,
        BM=height,
        BC=block,
        SILU=silu,
        num_warps=4,
    )
    return joined, normed
