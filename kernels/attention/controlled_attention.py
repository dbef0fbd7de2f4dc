"""Cross-attention that keeps the base's maps of unchanged words (Prompt-to-Prompt, Hertz et al. 2022; paper 3.1).

The base keeps the maps of its prompt's own tokens, the first L of the T that a text encoder gives, with one row a
pixel. What they leave of each query's attention went to the padding behind them: it goes to the edit's padding, divided
there as the edit divides its own. With all T tokens kept nothing is left, and the padding's maps are exchanged like any
other.

The controlled layer is plain attention plus what the exchange of maps changes. Where nothing is exchanged for
something else, because both prompts have the same words and all T tokens are kept, the change is exactly 0, so that a
controlled step then repeats the base's arithmetic bit for bit and the difference of the two generations holds no
rounding.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: A query whose kept tokens hold less than this of the base's attention has nothing to keep: scaling it up to
#: 1 would scale up the rounding of fp16 maps.
LEAST_SHARE = 1e-4


def attention_probabilities(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    samples: int,
    part: int = -1,
    tokens: int | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Cross-attention maps of the conditional part of the batch, to be recorded from the base run.

    Args:
        query: ``[B, heads, N, head_dim]``. Under guidance the batch consists of parts of ``samples`` each, one of
            which is conditional; without, it is that part alone.
        key: ``[B, heads, T, head_dim]``.
        samples: samples of the picture batch, ``n``.
        part: place of the conditional part in the batch, counted as Python counts: -1 is the last.
        tokens: L, how many tokens are kept, the first ones; None keeps all.
        scale: of the scores; default ``head_dim ** -0.5``.

    Returns:
        ``[n * N, heads, L]`` in the dtype of ``query``, contiguous: shares of all T tokens (computed in at least fp32).
    """
    own = _own_maps(query, key, _rows_of_part(query.shape[0], samples, part), scale)
    return own[..., :tokens].to(query.dtype).transpose(1, 2).flatten(0, 1).contiguous()


def controlled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    maps: torch.Tensor,
    mapper: torch.Tensor,
    keep: torch.Tensor,
    scale: float | None = None,
    part: int = -1,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-attention in which unchanged words keep the base's maps, in the conditional part of the batch only.

    ``out = attention(query, key, value) + (weight * probs - own) @ value`` with the ``probs`` of :func:`exchange_maps`.
    Both kinds of maps are rounded to the dtype of ``query``, as recorded ones are. Plain operations of torch: it
    compiles.

    Args:
        query: ``[B, heads, N, head_dim]``, see :func:`attention_probabilities`.
        key, value: ``[B, heads, T, head_dim]``.
        maps: ``[n * N, heads, L]``, from ``attention_probabilities`` of the base's same step and layer.
        mapper: ``[n, T, T]`` and
        keep: ``[n, T]``, from ``align_batch``.
        scale: of the scores; default ``head_dim ** -0.5``.
        part: place of the conditional part in the batch.
        weight: ``[n, T_edit]``, what the map of each token is multiplied by; None is 1 for all, with the same bits.

    Returns:
        ``[B, heads, N, head_dim]`` in the dtype of ``value``.

    Raises:
        ValueError: the batch does not consist of whole parts of n samples, or has no such part.
    """
    samples = mapper.shape[0]
    rows = _rows_of_part(query.shape[0], samples, part)
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    own = _own_maps(query, key, rows, scale).to(query.dtype).to(torch.promote_types(query.dtype, torch.float32))
    base = maps.unflatten(0, (samples, -1)).transpose(1, 2).to(own.dtype)  # [n, heads, N, L]
    probs = exchange_maps(own, base, mapper[:, None].to(own.dtype), keep[:, None, None].to(own.dtype))
    if weight is not None:
        probs = probs * weight[:, None, None].to(own.dtype)
    change = (probs - own).to(value.dtype) @ value[rows]
    return torch.cat([out[: rows.start], out[rows] + change, out[rows.stop :]])


def exchange_maps(own: torch.Tensor, base: torch.Tensor, mapper: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Maps in which unchanged words have the base's share, scaled so that each query's sum to what its own do.

    A query that gave all its attention to words that are gone keeps its own.

    Args:
        own: ``[..., N, T]``, of the edit's words.
        base: ``[..., N, L]``, of the base's first L tokens.
        mapper: ``[..., T, T]``: which tokens of the base stand for each of the edit's; its columns sum to 1 or 0.
        keep: ``[..., 1, T]``: 1 where a token takes the base's share.

    Returns:
        ``[..., N, T]``.
    """
    mapper = mapper[..., : base.shape[-1], :]
    padding = keep - mapper.sum(-2, keepdim=True)  # kept, but from tokens whose maps the base does not hold
    left = 1 - base.sum(-1, keepdim=True)
    of_padding = (own * padding).sum(-1, keepdim=True)
    grown = own * padding * (left / of_padding.clamp_min(LEAST_SHARE))
    probs = base @ mapper + grown + (1 - keep) * own
    total = probs.sum(-1, keepdim=True)
    scaled = probs * (own.sum(-1, keepdim=True) / total.clamp_min(LEAST_SHARE))
    return torch.where(total > LEAST_SHARE, scaled, own)


def _rows_of_part(batch: int, samples: int, part: int) -> slice:
    """The rows of one part of a batch of several parts of ``samples`` each.

    Raises:
        ValueError: the batch does not consist of whole parts, or has no such part.
    """
    parts = batch // samples
    if batch % samples or not -parts <= part < parts:
        raise ValueError(
            f"part {part} of {samples} sample(s) is not in a batch of {batch}: the batch has to be as long as the "
            "samples, or a multiple of that under guidance"
        )
    start = part % parts * samples
    return slice(start, start + samples)


def _own_maps(query: torch.Tensor, key: torch.Tensor, rows: slice, scale: float | None) -> torch.Tensor:
    """Maps ``[n, heads, N, T]`` of some rows of the batch, in at least fp32."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = query[rows].to(wide) @ key[rows].to(wide).transpose(-2, -1)
    return (scores * (query.shape[-1] ** -0.5 if scale is None else scale)).softmax(dim=-1)
