"""Launches attention on the GPU: chooses a tile and the splits of the keys, and joins what the splits computed."""

from __future__ import annotations

import math

import torch
import triton

from fisedit_compile.kernels.attention.attention_tiles import AttentionTile, choose_attention_tile, head_width
from fisedit_compile.kernels.attention.attention_triton import attention_kernel, join_splits_kernel
from fisedit_compile.kernels.launch.triton_launch import aligned, input_precision, launch, multiprocessors

#: Keys of a sample from which blocks of keys that need no mask are worth a loop of their own.
_UNMASKED_LOOP_FROM_KEYS = 1024


def head_last(tensor: torch.Tensor) -> torch.Tensor:
    """The same values [M, heads, hd], with all channels of a row in one piece; a copy where they are not yet.

    Rows need not follow each other: the queries, keys and values of a merged projection lie side by side in wider rows.
    """
    heads_together = tensor.stride(2) == 1 and tensor.stride(1) == tensor.shape[2]
    return tensor if heads_together else tensor.contiguous()


def launch_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    base: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor | None,
    scale: float | None,
    tile: AttentionTile | None,
) -> torch.Tensor:
    """Attention of the queries of each sample over its keys, [M, heads, hd].

    Args:
        q: [M, heads, hd].
        k, v: [Mk, heads, hd].
        base: ``(base_k, base_v, row_of)``: keys are the pixels of the base, some of them replaced by rows of k and v,
            see ``attention_cached_reference``. None: keys are the rows of k and v.
        q_offsets: int32 [B + 1], cumulative counts of queries.
        k_offsets: int32 [B + 1], cumulative counts of keys. None: every sample has as many; always so with a base.
        scale: of the scores; None for ``hd ** -0.5``.
        tile: of the kernel; None chooses one by size.

    Raises:
        ValueError: the scale is not positive.
    """
    if scale is not None and scale <= 0.0:
        raise ValueError(f"attention with scale={scale}: the kernel takes a positive one")
    q, k, v = head_last(q), head_last(k), head_last(v)
    (count, heads, head_dim), samples = q.shape, q_offsets.shape[0] - 1
    base_k, base_v, row_of = base or (None, None, None)
    keys = k if base_k is None else base_k
    tile = tile or choose_attention_tile(
        count, keys.shape[0], samples, heads, head_dim, q.dtype, multiprocessors(q.device), cached=base is not None
    )
    pixels = keys.shape[0] // samples  # the kernel reads it only without k_offsets
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    split = tile.splits > 1
    parts = q.new_empty(tile.splits, *q.shape, dtype=torch.float32) if split else out
    peaks, sums = (q.new_empty(tile.splits, count, heads, dtype=torch.float32) if split else None for _ in range(2))
    width = head_width(head_dim)
    strides = [0 if t is None else t.stride(0) for t in (q, k, v, base_k, base_v)]
    vectors = [t for t in (k, v, base_k, base_v) if t is not None]
    even = aligned(head_dim, *vectors) and all(t.stride(0) * t.element_size() % 16 == 0 for t in vectors)
    # Each sample may end within a block, so that there may be one more block for each sample but the last.
    launch(attention_kernel, (triton.cdiv(count, tile.queries) + samples - 1, heads, tile.splits), q)(
        q,
        k,
        v,
        base_k,
        base_v,
        row_of,
        q_offsets,
        k_offsets,
        parts,
        peaks,
        sums,
        count,
        samples,
        pixels,
        *strides,
        (head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
        HD=head_dim,
        WIDTH=width,
        BM=tile.queries,
        BN=tile.keys,
        LONG=keys.shape[0] > _UNMASKED_LOOP_FROM_KEYS * samples,
        ALIGNED=even,
        PRECISION=input_precision(q.dtype),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if split:
        launch(join_splits_kernel, (count * heads,), q)(
            parts,
            peaks,
            sums,
            out,
            count * heads,
            tile.splits,
            SPLITS=triton.next_power_of_2(tile.splits),
            HD=head_dim,
            WIDTH=width,
            num_warps=1,
        )
    return out
