"""Attention between rows on the GPU, as ``kernels/ops.py`` calls it."""

from __future__ import annotations

import torch

from fisedit_compile.kernels.attention.attention_launch import launch_attention
from fisedit_compile.kernels.attention.attention_tiles import AttentionTile
from fisedit_compile.kernels.launch.triton_launch import check_dtypes


def attention_rows_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    scale: float | None,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """``attention_rows`` on one GPU; its reference describes the arguments.

    torch's own ragged attention (``varlen_attn``, flash attention) takes 1.2 to 2.5 times as long at the sizes of
    sparse steps (H100, bf16, 5 to 20 heads of 64, 36 to 2800 queries a sample; ``docs/measurements/attention.md``).

    Args:
        tile: of the kernel; None chooses one by size.

    Returns:
        [M, heads, hd], contiguous; zeros for queries of a sample without keys.

    Raises:
        ValueError: the dtypes differ, or are none that the kernel takes, or the scale is not positive.
    """
    check_dtypes("attention_rows", q, k, v)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return launch_attention(q, k, v, None, q_offsets.contiguous(), k_offsets.contiguous(), scale, tile)
