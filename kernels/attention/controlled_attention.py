"""Cross-attention that keeps the base's maps of unchanged words (Prompt-to-Prompt, Hertz et al. 2022; paper 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

#: A query whose kept tokens hold less than this of the base's attention has nothing to keep: scaling it up to
#: 1 would scale up the rounding of fp16 maps.
_LEAST_SHARE = 1e-4


def attention_probabilities(
    query: torch.Tensor, key: torch.Tensor, *, samples: int, scale: float | None = None
) -> torch.Tensor:
    """Cross-attention maps of the conditional half, to be recorded from the base run.

    Args:
        query: ``[B, heads, N, head_dim]``; the last ``samples`` of the batch are the conditional half.
        key: ``[B, heads, T, head_dim]``.
        samples: samples of the picture batch, ``n``: B without classifier-free guidance, else B / 2.
        scale: of the scores; default ``head_dim ** -0.5``.

    Returns:
        ``[n, heads, N, T]`` in the dtype of ``query``, summing to 1 over T (computed in at least fp32).
    """
    return _softmax_scores(query[-samples:], key[-samples:], scale).to(query.dtype)


def controlled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    base_probs: torch.Tensor,
    mapper: torch.Tensor,
    keep: torch.Tensor,
    scale: float | None = None,
) -> torch.Tensor:
    """Cross-attention in which unchanged words keep the base's maps, in the conditional half of the batch
    only.

    ``probs = keep * (base_probs @ mapper) + (1 - keep) * fresh``, then scaled so that each query's sum to 1.
    A query that gave all its attention to words that are gone keeps its fresh ones. Plain torch operations:
    exports, compiles.

    Args:
        query: ``[B, heads, N, head_dim]``, B = n, or 2n with the unconditional half first.
        key, value: ``[B, heads, T_edit, head_dim]``.
        base_probs: ``[n, heads, N, T_base]``, from ``attention_probabilities`` of the base's same step and
            layer.
        mapper: ``[n, T_base, T_edit]`` and
        keep: ``[n, T_edit]``, from ``align_batch``.
        scale: of the scores; default ``head_dim ** -0.5``.

    Returns:
        ``[B, heads, N, head_dim]`` in the dtype of ``value``.

    Raises:
        ValueError: the batch is neither n nor 2n.
    """
    batch, samples = query.shape[0], base_probs.shape[0]
    if batch != samples and batch != 2 * samples:
        raise ValueError(
            f"attention maps of {samples} sample(s) were given for a batch of {batch}; the batch has to be "
            "as long, or twice as long under classifier-free guidance"
        )
    fresh = _softmax_scores(query[-samples:], key[-samples:], scale)  # [n, heads, N, T_edit]
    kept = base_probs.to(fresh.dtype) @ mapper[:, None].to(fresh.dtype)
    share = keep[:, None, None, :].to(fresh.dtype)
    probs = share * kept + (1 - share) * fresh
    total = probs.sum(dim=-1, keepdim=True)
    probs = torch.where(total > _LEAST_SHARE, probs / total.clamp_min(_LEAST_SHARE), fresh)
    conditional = probs.to(value.dtype) @ value[-samples:]
    if batch == samples:
        return conditional
    plain = F.scaled_dot_product_attention(query[:-samples], key[:-samples], value[:-samples], scale=scale)
    return torch.cat([plain, conditional])


def _softmax_scores(query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor:
    """``softmax(query @ key^T * scale)`` in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(dtype) @ key.to(dtype).transpose(-2, -1)
    return (scores * (query.shape[-1] ** -0.5 if scale is None else scale)).softmax(dim=-1)
