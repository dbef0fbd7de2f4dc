"""A 2-D convolution whose pixels are rows: each output row reads its taps through a table of neighbours.

This is the sparse convolution of FISEdit (Yu et al. 2023, section A.1) as an implicit GEMM: a matrix product whose left
factor is never stored. Stride, padding, dilation and a nearest upsampling before the convolution are all in the table,
so that one operator serves every combination of them. A linear layer of rows (:mod:`linear_rows`) is the same product
with one tap, the row itself, and so without a table.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fisedit_compile.kernels.implicit_gemm.epilogue import finish_rows_reference
from fisedit_compile.kernels.implicit_gemm.row_product_arguments import check_shortcut

# Most bytes of gathered neighbours that are held at once. malloc maps larger buffers afresh at every call, and their
# page faults cost more than the gather: 960 -> 320 channels at 64x64, batch 2, 30 %, takes 73 ms in one block and 54 in
# three.
COLUMNS_BYTES = 30 * 2**20


def conv2d_rows_reference(
    rows: torch.Tensor,
    halo: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    *epilogue: Any,
    **named: Any,
) -> torch.Tensor:
    """Convolve at the rows of ``table``: one gather and one matmul (for each block of a very large table).

    Args:
        rows: [R, Cin], the input's active pixels.
        halo: [Hh, Cin], inactive pixels that the taps also read, or None.
        weight: [Cout, K * Cin], tap-major: ``conv.weight.permute(0, 2, 3, 1).reshape(Cout, -1)``.
        bias: [Cout] or None.
        table: int32 [M, K]; an entry in [0, R) is a row, in [R, R + Hh) a halo row, -1 is outside the picture (zero).
        epilogue, named: ``count, sample, sample_bias, residual, scale, shift, activation``, see ``epilogue``, and
            ``shortcut`` [M, Cs] and ``shortcut_weight`` [Cout, Cs]: a 1x1 convolution of other rows at the same pixels,
            whose result is added to this one's.

    Returns:
        [M, Cout], half as wide for ``geglu``. R, Hh and M may each be 0.

    Raises:
        IndexError: an entry of ``table`` is over R + Hh.
        RuntimeError: the channels or dtypes of the arguments do not fit.
        ValueError: arguments of the epilogue do not go together, or those of the shortcut do not fit.
    """
    return conv2d_rows_and_norm_reference(rows, halo, weight, bias, table, *epilogue, **named)[1]


def conv2d_rows_and_norm_reference(
    rows: torch.Tensor,
    halo: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    count: torch.Tensor | None = None,
    sample: torch.Tensor | None = None,
    sample_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str = "none",
    shortcut: torch.Tensor | None = None,
    shortcut_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`conv2d_rows_reference`, with the result both before and after norm and activation."""
    product = _convolve(rows, halo, weight, bias, table)
    check_shortcut("conv2d_rows", shortcut, shortcut_weight, outputs=table.shape[0], filters=weight.shape[0])
    if shortcut is not None and shortcut_weight is not None:
        product = torch.addmm(product, shortcut, shortcut_weight.t())
    return finish_rows_reference(product, count, sample, sample_bias, residual, scale, shift, activation)


def _convolve(
    rows: torch.Tensor,
    halo: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
) -> torch.Tensor:
    zero = rows.new_zeros(1, rows.shape[1])
    source = torch.cat([rows, zero] if halo is None else [rows, halo, zero])  # [R + Hh + 1, Cin]
    table = torch.where(table < 0, source.shape[0] - 1, table)
    block = max(1, COLUMNS_BYTES // (weight.shape[1] * weight.element_size()))  # rows of the table
    parts = [
        F.linear(source.index_select(0, taps.flatten()).view(taps.shape[0], weight.shape[1]), weight, bias)
        for taps in table.split(block)  # [block, K] -> columns [block, K * Cin] -> [block, Cout]
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
