"""Active queries over all keys of their picture on the GPU: the base's keys and values, with fresh rows in place."""

from __future__ import annotations

import torch

from fisedit_compile.kernels.attention.attention_launch import head_last, launch_attention
from fisedit_compile.kernels.attention.attention_tiles import AttentionTile
from fisedit_compile.kernels.attention.merge_rows_triton import merge_rows
from fisedit_compile.kernels.launch.triton_launch import check_dtypes

#: Of a sample, from which bringing keys in order pays for itself.
_MANY_QUERIES, _MANY_KEYS = 256, 1024


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
    """Attend over base and fresh keys; arguments as of the reference in ``attention_rows``, on one GPU.

    ``tile`` None takes one by size, and so does ``merged``: whether keys and values are brought in order first.

    Returns:
        [M, heads, hd], contiguous.

    Raises:
        ValueError: dtypes that differ or that the kernel does not take.
    """
    check_dtypes("attention_cached", q, k, v, base_k, base_v)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    k, v, base_k, base_v = (head_last(each) for each in (k, v, base_k, base_v))
    row_of, offsets, samples = row_of.contiguous(), offsets.contiguous(), offsets.shape[0] - 1
    if merged is None:
        merged = q.shape[0] >= _MANY_QUERIES * samples and base_k.shape[0] >= _MANY_KEYS * samples
    if merged:
        return launch_attention(q, *merge_rows(k, v, base_k, base_v, row_of), None, offsets, None, scale, tile)
    return launch_attention(q, k, v, (base_k, base_v, row_of), offsets, None, scale, tile)
