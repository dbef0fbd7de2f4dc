"""The epilogue: what a product of rows does to its result before it is stored, the same for every such operator.

    raw    = product + bias + sample_bias[sample] + residual
    normed = activation(raw * scale[sample] + shift[sample])       without scale: activation(raw)

A group norm with the base's statistics (FISEdit, Yu et al. 2023, section A.2) is one scale and one shift for each
sample and channel. As a part of the epilogue it needs no pass over the rows of its own. ``geglu`` halves the width: its
result is the first half of the product's columns times the GELU of the second half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fisedit_compile.kernels.implicit_gemm.row_product_arguments import check_epilogue


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
    """``raw`` and ``normed`` of a product to which its bias has been added.

    Args:
        product: [M, N].
        count: int32 [1], how many rows are real, see ``ops``; a reference computes padded rows as well.
        sample: int64 [M], the batch element that each row belongs to.
        sample_bias: [B, N], added to every row of a sample: the time embedding.
        residual: [M, N], added to the rows.
        scale, shift: [B, N], fp32 or better, of a norm with known statistics; it is computed in fp32 or better.
        activation: what is applied last, to ``normed`` alone: ``"none"``, ``"silu"`` or ``"geglu"``.

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
