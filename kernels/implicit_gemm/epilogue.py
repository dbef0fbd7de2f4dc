"""What the row products (convolution, linear layer) do to a result before it is stored: one definition for all of them.

    raw    = product + bias + sample_bias[sample] + residual
    normed = activation(raw * scale[sample] + shift[sample])       without scale: activation(raw)

A group norm with the base's statistics (FISEdit, Yu et al. 2023, section A.2) is one scale and shift for each sample
and channel, so that it needs no pass over the rows of its own. ``geglu`` halves the width: the first half of the
product's columns times the GELU of the second.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

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


def finish_rows_reference(
    product: torch.Tensor,
    count: torch.Tensor | None = None,
    sample: torch.Tensor | None = None,
    sample_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """``raw`` and ``normed`` of a product that has its bias.

    Args:
        product: [M, N].
        count: int32 [1], see ``ops``; not read here.
        sample: int64 [M], the batch element of each row.
        sample_bias: [B, N].
        residual: [M, N].
        scale, shift: [B, N], fp32 or better; the norm is computed in fp32 or better.
        activation: of ``normed``: ``"none"``, ``"silu"`` or ``"geglu"``.

    Returns:
        [M, N] each; ``normed`` is [M, N / 2] for ``geglu``.

    Raises:
        ValueError: arguments that do not go together.
    """
    check_epilogue("epilogue", sample, sample_bias, residual, scale, shift, activation)
    if sample_bias is not None:
        assert sample is not None
        product = product + sample_bias.index_select(0, sample)
    raw = product if residual is None else product + residual
    if activation == "geglu":
        value, gate = raw.chunk(2, 1)
        return raw, value * F.gelu(gate)
    normed = raw
    if scale is not None:
        assert sample is not None
        assert shift is not None
        normed = scale_and_shift(raw, sample, scale, shift)
    return raw, F.silu(normed) if activation == "silu" else normed


def scale_and_shift(rows: torch.Tensor, sample: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """``rows * scale[sample] + shift[sample]``, computed in fp32 or better, in the dtype of ``rows`` [M, N]."""
    compute = torch.promote_types(rows.dtype, torch.float32)
    scale, shift = (t.to(compute).index_select(0, sample) for t in (scale, shift))
    return torch.addcmul(shift, rows.to(compute), scale).to(rows.dtype)
