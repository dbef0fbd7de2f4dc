"""Cross-attention that keeps the base's maps of unchanged words (Prompt-to-Prompt, Hertz et al. 2022; paper 3.1).

The controlled layer is plain attention plus what the exchange of maps changes. Where nothing is exchanged for
something else, because both prompts have the same words, the change is exactly 0, so that a controlled step then
repeats the base's arithmetic bit for bit and the difference of the two generations holds no rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: A query whose kept tokens hold less than this of the base's attention has nothing to keep: scaling it up to
#: 1 would scale up the rounding of fp16 maps.
_LEAST_SHARE = 1e-4


def attention_probabilities(
    query: torch.Tensor, key: torch.Tensor, *, samples: int, part: int = -1, scale: float | None = None
) -> torch.Tensor:
    """Cross-attention maps of the conditional part of the batch, to be recorded from the base run.

    Args:
        query: ``[B, heads, N, head_dim]``. Under guidance the batch consists of parts of ``samples`` each, one of
            which is conditional; without, it is that part alone.
        key: ``[B, heads, T, head_dim]``.
        samples: samples of the picture batch, ``n``.
        part: place of the conditional part in the batch, counted as Python counts: -1 is the last.
        scale: of the scores; default ``head_dim ** -0.5``.

    Returns:
        ``[n, heads, N, T]`` in the dtype of ``query``, summing to 1 over T (computed in at least fp32).
    """
    rows = _rows_of_part(query.shape[0], samples, part)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query[rows].to(wide) @ key[rows].to(wide).transpose(-2, -1)
    return (scores * (query.shape[-1] ** -0.5 if scale is None else scale)).softmax(dim=-1).to(query.dtype)


def controlled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    base_probs: torch.Tensor,
    mapper: torch.Tensor,
    keep: torch.Tensor,
    scale: float | None = None,
    part: int = -1,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-attention in which unchanged words keep the base's maps, in the conditional part of the batch only.

    ``probs = keep * (base_probs @ mapper) + (1 - keep) * own``, then scaled so that each query's sum to what its own
    do, and ``out = attention(query, key, value) + (weight * probs - own) @ value``. A query that gave all its attention
    to words that are gone keeps its own. Both kinds of maps are rounded to the dtype of ``query``, as recorded ones
    are. Plain torch operations: exports, compiles.

    Args:
        query: ``[B, heads, N, head_dim]``, see :func:`attention_probabilities`.
        key, value: ``[B, heads, T_edit, head_dim]``.
        base_probs: ``[n, heads, N, T_base]``, from ``attention_probabilities`` of the base's same step and layer.
        mapper: ``[n, T_base, T_edit]`` and
        keep: ``[n, T_edit]``, from ``align_batch``.
        scale: of the scores; default ``head_dim ** -0.5``.
        part: place of the conditional part in the batch.
        weight: ``[n, T_edit]``, what the map of each token is multiplied by; None is 1 for all, with the same bits.

    Returns:
        ``[B, heads, N, head_dim]`` in the dtype of ``value``.

    Raises:
        ValueError: the batch does not consist of whole parts of n samples, or has no such part.
    """
    rows = _rows_of_part(query.shape[0], base_probs.shape[0], part)
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    own = attention_probabilities(query, key, samples=base_probs.shape[0], part=part, scale=scale)
    own = own.to(torch.promote_types(query.dtype, torch.float32))  # [n, heads, N, T_edit]
    kept = base_probs.to(own.dtype) @ mapper[:, None].to(own.dtype)
    share = keep[:, None, None, :].to(own.dtype)
    probs = share * kept + (1 - share) * own
    total = probs.sum(dim=-1, keepdim=True)
    scaled = probs * (own.sum(dim=-1, keepdim=True) / total.clamp_min(_LEAST_SHARE))
    probs = torch.where(total > _LEAST_SHARE, scaled, own)
    if weight is not None:
        probs = probs * weight[:, None, None, :].to(own.dtype)
    change = (probs - own).to(value.dtype) @ value[rows]
    return torch.cat([out[: rows.start], out[rows] + change, out[rows.stop :]])


def _rows_of_part(batch: int, samples: int, part: int) -> slice:
    """The rows of one part of a batch of several parts of ``samples`` each."""
    parts = batch // samples
    if batch % samples or not -parts <= part < parts:
        raise ValueError(
            f"part {part} of {samples} sample(s) is not in a batch of {batch}: the batch has to be as long as the "
            "samples, or a multiple of that under guidance"
        )
    start = part % parts * samples
    return slice(start, start + samples)
