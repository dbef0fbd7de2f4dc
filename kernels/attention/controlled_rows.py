"""Cross-attention of rows that keeps the base's maps of unchanged words: ``controlled_attention`` for active pixels."""

from __future__ import annotations

import torch

from fisedit_compile.kernels.attention.attention_rows import attention_rows_reference
from fisedit_compile.kernels.attention.controlled_attention import attention_probabilities, exchange_maps


def controlled_rows_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    offsets: torch.Tensor,
    index: torch.Tensor,
    maps: torch.Tensor,
    span: torch.Tensor,
    mapper: torch.Tensor,
    keep: torch.Tensor,
    weight: torch.Tensor,
    pixels: int,
    scale: float | None,
) -> torch.Tensor:
    """Cross-attention of the active queries; those of the conditional part take the base's share of unchanged words.

    See :mod:`fisedit_compile.kernels.attention.controlled_attention` for how maps are exchanged.

    Args:
        q: [M, heads, hd], the active pixels, sorted by sample.
        k, v: [B * T, heads, hd], the text's tokens, T of each sample.
        offsets: int32 [B + 1], cumulative counts of active pixels.
        index: int64 [M], the pixel id of each row.
        maps: [n * pixels, heads, L], the base's for the n samples of the conditional part; only read. On a GPU it may
            be an int64 [1] that holds the address of such maps, so that a CUDA graph can read those of any step.
        span: int32 [3]: L, the first sample of the conditional part, and the one behind its last. Where L is 0 nothing
            is exchanged, and the maps are not read.
        mapper: fp32 [n or more, T, T], keep: fp32 [n or more, T], see :func:`exchange_maps`.
        weight: fp32 [n or more, T], what the map of each token is multiplied by behind the exchange.
        pixels: of a sample.
        scale: of the scores; None means 1 / sqrt(hd).

    Returns:
        [M, heads, hd], contiguous.
    """
    batch = offsets.shape[0] - 1
    tokens = k.shape[0] // batch
    text_offsets = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int32)
    out = attention_rows_reference(q, k, v, offsets, text_offsets, scale)
    length, begin, end = span.tolist()
    if not length:
        return out
    wide = torch.promote_types(q.dtype, torch.float32)
    starts = offsets.tolist()
    for picture, sample in enumerate(range(begin, end)):
        row, text = slice(starts[sample], starts[sample + 1]), slice(sample * tokens, (sample + 1) * tokens)
        query, key, value = (each.transpose(0, 1) for each in (q[row], k[text], v[text]))  # [heads, rows or tokens, hd]
        scores = query.to(wide) @ key.to(wide).transpose(1, 2)
        own = (scores * (q.shape[-1] ** -0.5 if scale is None else scale)).softmax(-1).to(q.dtype).to(wide)
        base = maps[index[row] - begin * pixels].transpose(0, 1).to(wide)
        probs = exchange_maps(own, base, mapper[picture].to(wide), keep[picture].to(wide))
        change = (probs * weight[picture].to(wide) - own).to(v.dtype) @ value
        out[row] += change.transpose(0, 1)
    return out


def cross_attention_maps(
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float | None,
    *,
    batch: int,
    samples: int,
    part: int = -1,
    tokens: int | None = None,
) -> torch.Tensor:
    """The maps that a base keeps of a cross-attention all of whose pixels are rows.

    Args:
        q: [B * pixels, heads, hd].
        k: [B * T, heads, hd].
        scale: of the scores; None means 1 / sqrt(hd).
        batch: B.
        samples, part, tokens: see :func:`attention_probabilities`.

    Returns:
        [n * pixels, heads, L], as of :func:`attention_probabilities`.
    """
    query, key = (each.unflatten(0, (batch, -1)).transpose(1, 2) for each in (q, k))
    return attention_probabilities(query, key, samples=samples, part=part, tokens=tokens, scale=scale)
