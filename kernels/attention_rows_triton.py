"""Ragged attention between rows on the GPU: torch's flash attention, and the project's own kernel where that cannot."""

from __future__ import annotations

from functools import cache

import torch
from torch.nn.attention.varlen import varlen_attn

from fisedit_compile.kernels.attention_tiles import AttentionTile
from fisedit_compile.kernels.attention_triton import launch_attention
from fisedit_compile.kernels.triton_launch import check_dtypes, launch_on


def attention_rows_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    scale: float | None,
    tile: AttentionTile | None = None,
) -> torch.Tensor:
    """Ragged attention by the kernel of ``attention_triton``, on one GPU; arguments as of the reference.

    Returns:
        [M, heads, hd], contiguous; zeros for queries of a sample without keys.

    Raises:
        ValueError: dtypes that differ or that the kernel does not take.
    """
    check_dtypes("attention_rows", q, k, v)
    if q.numel() == 0:
        return torch.empty_like(q, memory_format=torch.contiguous_format)
    return launch_attention(q, k, v, None, q_offsets.contiguous(), k_offsets.contiguous(), scale, tile)


def attention_rows_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Ragged attention by torch's flash attention where it takes the arguments, else by ``attention_rows_triton``.

    Flash attention takes fp16 and bf16, head dims of a multiple of 8 up to 256, and at least one query and key. The
    longest sequence is given as the number of all rows: its true length would have to be read from the device.
    """
    head_dim = q.shape[2]
    fits = q.dtype.itemsize == 2 and head_dim % 8 == 0 and head_dim <= 256 and q.numel() and k.numel()
    if not fits or not _has_flash_attention(q.device):
        return attention_rows_triton(q, k, v, q_offsets, k_offsets, scale)
    check_dtypes("attention_rows", q, k, v)
    q, k, v = (t if t.stride(2) == 1 else t.contiguous() for t in (q, k, v))
    with launch_on(q):
        out = varlen_attn(q, k, v, q_offsets, k_offsets, q.shape[0], k.shape[0], scale=scale)
    assert isinstance(out, torch.Tensor)
    return out.contiguous()


@cache
def _has_flash_attention(device: torch.device) -> bool:
    """Whether this build of torch has flash attention and the GPU runs it."""
    return torch.backends.cuda.is_flash_attention_available() and torch.cuda.get_device_capability(device) >= (8, 0)
