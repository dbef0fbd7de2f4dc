"""Active queries over all keys of their picture on the GPU: the base's keys and values, with fresh rows in place.

Two launches: one finds for every pixel the row that replaces it, the other attends and reads each key from where it is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.attention_tiles import AttentionTile
from fisedit_compile.kernels.attention_triton import head_last, launch_attention
from fisedit_compile.kernels.triton_launch import check_dtypes, launch_on

_PIXELS = 256  # of a program


@triton.jit(do_not_specialize=["halvings", "pixels"])
def _row_of_kernel(
    index: tl.tensor,  # int64, ascending up to the last real row
    row_of: tl.tensor,  # int32 [pixels]
    count: tl.tensor,  # int32 [1]: how many rows are real
    halvings: tl.tensor,
    pixels: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros((BLOCK,), dtype=tl.int32)
    rows = tl.load(count)
    high = low + rows
    for _ in range(halvings):  # a binary search for the first row whose pixel is not below
        open_ = low < high
        middle = (low + high) // 2
        below = tl.load(index + middle, mask=open_, other=0) < pixel
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (below == 0), middle, high)
    found = tl.load(index + low, mask=low < rows, other=-1) == pixel
    tl.store(row_of + pixel, tl.where(found, low, -1), mask=pixel < pixels)


def row_of_pixels(index: torch.Tensor, count: torch.Tensor, pixels: int) -> torch.Tensor:
    """int32 [pixels]: the row of each pixel, -1 where none is.

    ``index`` int64 [M] is ascending in the first ``count``, int32 [1] on the device; the rest is padding.
    """
    row_of = index.new_empty(pixels, dtype=torch.int32)
    with launch_on(index):
        _row_of_kernel[(triton.cdiv(pixels, _PIXELS),)](
            index,
            row_of,
            count,
            index.shape[0].bit_length(),
            pixels,
            BLOCK=_PIXELS,
            num_warps=4,
        )
    return row_of


def attention_cached_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    base_k: torch.Tensor,
    base_v: torch.Tensor,
    index: torch.Tensor,
    offsets: torch.Tensor,
    scale: float | None,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """Attend over base and fresh keys; arguments as of the reference in ``attention_rows``, on one GPU.

    ``index`` must ascend, as rows do everywhere. ``tile`` None takes one by size.

    Returns:
        [M, heads, hd], contiguous.

    Raises:
        ValueError: dtypes that differ or that the kernel does not take.
    """
    check_dtypes("attention_cached", q, k, v, base_k, base_v)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    row_of = row_of_pixels(index.contiguous(), offsets[-1:], base_k.shape[0])
    base = (head_last(base_k), head_last(base_v), row_of)
    return launch_attention(q, k, v, base, offsets.contiguous(), None, scale, tile)
