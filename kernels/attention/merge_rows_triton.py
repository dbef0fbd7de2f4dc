"""Copies a base's keys and values on the GPU, with fresh rows in the places of their pixels.

Attention that chooses each key by its address is slower than attention over keys that lie in order. From a few hundred
queries on, this copy takes less time than it saves: ``docs/measurements/attention.md`` has both times by size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.launch.triton_launch import aligned, launch

_PIXELS, _CHANNELS = 64, 64  # that a program copies


@triton.jit(do_not_specialize=["pixels"])
def merge_rows_kernel(
    k: tl.tensor,  # [M, channels]
    v: tl.tensor,
    base_k: tl.tensor,  # [pixels, channels]
    base_v: tl.tensor,
    row_of: tl.tensor,  # int32 [pixels]: the row that replaces a pixel, or -1
    out_k: tl.tensor,  # [pixels, channels]
    out_v: tl.tensor,
    pixels: tl.tensor,
    channels: tl.tensor,
    k_stride: tl.tensor,  # elements from a row or pixel to the next
    v_stride: tl.tensor,
    base_k_stride: tl.tensor,
    base_v_stride: tl.tensor,
    BP: tl.constexpr,
    BC: tl.constexpr,
    ALIGNED: tl.constexpr,  # every row that is read starts at a multiple of 16 bytes
) -> None:
    pixel = tl.program_id(0) * BP + tl.arange(0, BP)  # [BP]
    channel = tl.program_id(1) * BC + tl.arange(0, BC)  # [BC]
    valid = pixel < pixels
    row = tl.load(row_of + pixel, mask=valid, other=-1)
    fresh, row, at = row >= 0, row.to(tl.int64), pixel.to(tl.int64)
    k_at = tl.where(fresh, k + row * k_stride, base_k + at * base_k_stride)
    v_at = tl.where(fresh, v + row * v_stride, base_v + at * base_v_stride)
    if ALIGNED:  # the choice of two pointers hides it from the compiler, whose loads would be narrow
        k_at = tl.multiple_of(k_at, [16])
        v_at = tl.multiple_of(v_at, [16])
    inside = valid[:, None] & (channel < channels)[None, :]
    out_at = at[:, None] * channels + channel[None, :]  # [BP, BC]
    tl.store(out_k + out_at, tl.load(k_at[:, None] + channel[None, :], mask=inside), mask=inside)
    tl.store(out_v + out_at, tl.load(v_at[:, None] + channel[None, :], mask=inside), mask=inside)


def merge_rows(
    k: torch.Tensor, v: torch.Tensor, base_k: torch.Tensor, base_v: torch.Tensor, row_of: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of all pixels.

    Args:
        k, v: [M, heads, hd], fresh rows. All channels of a row are in one piece; rows need not follow each other.
        base_k, base_v: [P, heads, hd], the base's pixels, in the same form; only read.
        row_of: int32 [P], the row of k and v that replaces a pixel, -1 for none.

    Returns:
        [P, heads, hd] each, contiguous.
    """
    read = (k, v, base_k, base_v)
    out_k, out_v = (torch.empty_like(base, memory_format=torch.contiguous_format) for base in (base_k, base_v))
    pixels, channels = base_k.shape[0], base_k.shape[1] * base_k.shape[2]
    launch(merge_rows_kernel, (triton.cdiv(pixels, _PIXELS), triton.cdiv(channels, _CHANNELS)), base_k)(
        *read,
        row_of,
        out_k,
        out_v,
        pixels,
        channels,
        *(each.stride(0) for each in read),
        BP=_PIXELS,
        BC=_CHANNELS,
        ALIGNED=all(aligned(each.stride(0), each) for each in read),
        num_warps=4,
    )
    return out_k, out_v
