"""Attention of the active queries over all keys of their picture on the GPU, as ``kernels/ops.py`` calls it.

The keys and values are those of the base, but for the active pixels, which have fresh ones.
"""

from __future__ import annotations

import torch

from fisedit_compile.kernels.attention.attention_launch import head_last, launch_attention
from fisedit_compile.kernels.attention.attention_tiles import AttentionTile
from fisedit_compile.kernels.attention.merge_rows_triton import merge_rows
from fisedit_compile.kernels.launch.triton_launch import check_dtypes

#: Queries and keys of a sample from which it takes less time to bring keys and values in order first.
_MERGE_FROM_QUERIES, _MERGE_FROM_KEYS = 256, 1024


def attention_cached_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    base_k: torch.Tensor,
    base_v: torch.Tensor,
    row_of: torch.Tensor,
    offsets: torch.Tensor,
    scale: float | None,
    tile: AttentionTile | None = None,
    merged: bool | None = None,
) -> torch.Tensor:
    """``attention_cached`` on one GPU; its reference describes the arguments.

    Args:
        tile: of the kernel; None chooses one by size.
        merged: bring keys and values in order first, instead of choosing each by address; None decides by size.

    Returns:
        [M, heads, hd], contiguous.

    Raises:
        ValueError: the dtypes differ, or are none that the kernel takes, or the scale is not positive.
    """
    check_dtypes("attention_cached", q, k, v, base_k, base_v)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    k, v, base_k, base_v = (head_last(each) for each in (k, v, base_k, base_v))
    row_of, offsets, samples = row_of.contiguous(), offsets.contiguous(), offsets.shape[0] - 1
    if merged is None:
        merged = q.shape[0] >= _MERGE_FROM_QUERIES * samples and base_k.shape[0] >= _MERGE_FROM_KEYS * samples
    if merged:
        return launch_attention(q, *merge_rows(k, v, base_k, base_v, row_of), None, offsets, None, scale, tile)
    return launch_attention(q, k, v, (base_k, base_v, row_of), offsets, None, scale, tile)
