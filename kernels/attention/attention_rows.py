"""Attention between rows: ragged self- and cross-attention, and active queries over all keys of their picture.

Rows are sorted by sample. ``offsets``, int32 [B + 1], are cumulative counts of rows: sample b has the rows from
``offsets[b]`` to ``offsets[b + 1]``, the last not included. Rows behind the last offset are padding, whose results are
unspecified. FISEdit (Yu et al. 2023, section A.3) lets active tokens attend to active tokens alone. With the keys and
values of the base's run, the active queries see the whole picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """Batched attention of q [B, n, heads, hd] over k and v [B, m, heads, hd], which gives [B, n, heads, hd]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=scale)
    return out.transpose(1, 2)


def attention_rows_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_offsets: torch.Tensor,
    k_offsets: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Ragged attention: the queries of a sample attend to the keys of that sample only.

    Shapes: q [M, heads, hd], k and v [Mk, heads, hd], offsets int32 [B + 1]. ``scale`` None means 1 / sqrt(hd). A
    sample may have no queries; queries of a sample without keys give zeros.

    Returns:
        [M, heads, hd], contiguous.
    """
    q_counts, k_counts = q_offsets.diff().tolist(), k_offsets.diff().tolist()
    padding = q.shape[0] - sum(q_counts)
    q, k, v = q[: sum(q_counts)], k[: sum(k_counts)], v[: sum(k_counts)]
    # All samples have as many rows, as the two halves of classifier-free guidance do: one batched call serves them.
    if len(set(q_counts)) == len(set(k_counts)) == 1:
        batch = len(q_counts)
        q, k, v = (t.unflatten(0, (batch, n)) for t, n in ((q, q_counts[0]), (k, k_counts[0]), (v, k_counts[0])))
        parts = [_attend(q, k, v, scale).flatten(0, 1)]
    else:
        samples = zip(q.split(q_counts), k.split(k_counts), v.split(k_counts), strict=True)
        parts = [_attend(q[None], k[None], v[None], scale)[0] for q, k, v in samples]
    if padding:
        parts.append(parts[0].new_empty(padding, *parts[0].shape[1:]))
    return torch.cat(parts) if len(parts) > 1 else parts[0].contiguous()


def attention_cached_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    base_k: torch.Tensor,
    base_v: torch.Tensor,
    row_of: torch.Tensor,
    offsets: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Active queries attend to every pixel of their picture: fresh keys at the active pixels, the base's elsewhere.

    Args:
        q, k, v: [M, heads, hd], the active pixels.
        base_k, base_v: [P, heads, hd], all pixels of the base: B = len(offsets) - 1 samples of P / B pixels; only read.
        row_of: int32 [P], the row that replaces a pixel, -1 for none.
        offsets: int32 [B + 1], cumulative counts of active pixels.
        scale: of the scores; None means 1 / sqrt(hd).

    Returns:
        [M, heads, hd], contiguous.
    """
    samples = offsets.shape[0] - 1
    pixels = base_k.shape[0] // samples
    pixel = (row_of >= 0).nonzero().squeeze(1)
    row = row_of[pixel]
    base_k, base_v = base_k.index_copy(0, pixel, k[row]), base_v.index_copy(0, pixel, v[row])
    k_offsets = torch.arange(0, (samples + 1) * pixels, pixels, dtype=torch.int32)
    return attention_rows_reference(q, base_k, base_v, offsets, k_offsets, scale)
