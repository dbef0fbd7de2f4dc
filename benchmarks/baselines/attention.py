"""Attention of a diffusers U-Net taken apart, for methods that change what happens inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

#: ``[B, heads, N, d]`` queries, keys and values -> ``[B, heads, N, d]``.
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def attend(attn: Any, hidden_states: Tensor, text: Tensor | None, core: Core) -> Tensor:
    """Do what an attention processor does, with ``core`` in place of scaled dot-product attention.

    Args:
        attn: diffusers' ``Attention`` module of a Stable Diffusion U-Net (no norms, masks or residual of its own).
        hidden_states: ``[B, N, C]``.
        text: ``[B, tokens, width]`` for cross-attention, None for self-attention.
    """

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(2, (attn.heads, -1)).transpose(1, 2)

    source = hidden_states if text is None else text
    out = core(heads(attn.to_q(hidden_states)), heads(attn.to_k(source)), heads(attn.to_v(source)))
    result: Tensor = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
    return result
