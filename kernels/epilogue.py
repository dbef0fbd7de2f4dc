"""What the row products (convolution, linear layer) do to a result before it is stored: one definition for all of them.

    raw    = product + bias + sample_bias[sample] + residual
    normed = activation(raw * scale[sample] + shift[sample])       without scale: activation(raw)

A group norm with the base's statistics (FISEdit, Yu et al. 2023, section A.2) is one scale and shift for each sample
and channel, so that it needs no pass over the rows of its own. ``geglu`` halves the width: the first half of the
product's columns times the GELU of the second.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Activation = Literal["none", "silu", "geglu"]

#: The arguments of the epilogue in an operator's schema; ``count`` is described in ``ops``.
SCHEMA = (
    "Tensor? count=None, Tensor? sample=None, Tensor? sample_bias=None, Tensor? residual=None, Tensor? scale=None, "
    'Tensor? shift=None, str activation="none"'
)


def check_epilogue(
    op: str,
    sample: torch.Tensor | None,
    sample_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    activation: str,
) -> None:
    """Raises ValueError for arguments that do not go together."""
    if activation not in ("none", "silu", "geglu"):
        raise ValueError(f"{op}: activation={activation!r}; give 'none', 'silu' or 'geglu'")
    if (scale is None) != (shift is None):
        raise ValueError(f"{op}: a norm takes scale and shift; give both or neither")
    if sample is None and not (sample_bias is None and scale is None):
        raise ValueError(f"{op}: sample_bias and scale are of samples; give the sample of each row, too")
    if activation == "geglu" and not (sample_bias is None and residual is None and scale is None):
        raise ValueError(f"{op}: geglu halves the width; it takes no sample_bias, residual or norm")


def raw_rows_reference(
    product: torch.Tensor,
    sample: torch.Tensor | None,
    sample_bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    """``raw``: product [M, N] with its bias, sample int64 [M], sample_bias [B, N], residual [M, N]."""
    if sample_bias is not None:
        assert sample is not None
        product = product + sample_bias.index_select(0, sample)
    return product if residual is None else product + residual


def normed_rows_reference(
    raw: torch.Tensor,
    sample: torch.Tensor | None,
    scale: torch.Tensor | None,
    shift: torch.Tensor | None,
    activation: str,
) -> torch.Tensor:
    """``normed``: raw [M, N], scale and shift [B, N] in fp32 or better; [M, N], or [M, N / 2] for ``geglu``."""
    if activation == "geglu":
        value, gate = raw.chunk(2, 1)
        return value * F.gelu(gate)
    if scale is not None:
        assert sample is not None
        assert shift is not None
        compute = torch.promote_types(raw.dtype, torch.float32)
        scale, shift = (t.to(compute).index_select(0, sample) for t in (scale, shift))
        raw = torch.addcmul(shift, raw.to(compute), scale).to(raw.dtype)
    return F.silu(raw) if activation == "silu" else raw
