"""Active queries over all keys of their picture on the GPU: the base's keys and values, with fresh rows in place."""

from __future__ import annotations

import torch

from fisedit_compile.kernels.attention_launch import head_last, launch_attention
from fisedit_compile.kernels.attention_tiles import AttentionTile
from fisedit_compile.kernels.triton_launch import check_dtypes


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
) -> torch.Tensor:
    """Attend over base and fresh keys; arguments as of the reference in ``attention_rows``, on one GPU.

    ``tile`` None takes one by size.

    Returns:
        [M, heads, hd], contiguous.

    Raises:
        ValueError: dtypes that differ or that the kernel does not take.
    """
    check_dtypes("attention_cached", q, k, v, base_k, base_v)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    base = (head_last(base_k), head_last(base_v), row_of.contiguous())
    return launch_attention(q, k, v, base, offsets.contiguous(), None, scale, tile)
