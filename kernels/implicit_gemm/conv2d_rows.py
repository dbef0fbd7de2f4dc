"""A 2-D convolution whose pixels are rows: each output row reads its taps through a table of neighbours.

This is the sparse convolution of FISEdit (Yu et al. 2023, section A.1) as an implicit GEMM. Stride, padding, dilation
and a nearest upsampling before the convolution are all in the table, so one op serves all of them. A linear layer
(:mod:`linear_rows`) is the case of one tap, the row itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fisedit_compile.kernels.implicit_gemm.epilogue import finish_rows_reference

# The columns are gathered in blocks of at most this size. Larger buffers are mapped afresh by malloc at every call, and
# their page faults cost more than the gather: 960 -> 320 at 64x64, batch 2, 30 %: 73 ms in one block, 54 ms in three.
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
            ``beside`` [M, Cb] and ``beside_weight`` [Cout, Cb], whose product is added: a 1x1 convolution beside it.

    Returns:
        [M, Cout], half as wide for ``geglu``. R, Hh and M may each be 0.

    Raises:
        IndexError: an entry of ``table`` is over R + Hh.
        RuntimeError: the channels or dtypes of the arguments do not fit.
        ValueError: arguments of the epilogue that do not go together, or those of a shortcut do not fit.
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
    beside: torch.Tensor | None = None,
    beside_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`conv2d_rows_reference`, with the result both before and after norm and activation."""
    product = _convolve(rows, halo, weight, bias, table)
    check_beside("conv2d_rows", beside, beside_weight, outputs=table.shape[0], filters=weight.shape[0])
    if beside is not None and beside_weight is not None:
        product = torch.addmm(product, beside, beside_weight.t())
    return finish_rows_reference(product, count, sample, sample_bias, residual, scale, shift, activation)


def check_beside(
    op: str, beside: torch.Tensor | None, beside_weight: torch.Tensor | None, *, outputs: int, filters: int
) -> None:
    """Raises ValueError unless the arguments of a shortcut beside a convolution fit it and each other."""
    if beside is None and beside_weight is None:
        return
    if beside is None or beside_weight is None:
        raise ValueError(f"{op}: rows beside a convolution and their weight belong together; give both or neither")
    if beside.shape[0] != outputs:
        raise ValueError(
            f"{op}: {beside.shape[0]} rows beside a convolution of {outputs}; give one for each output row"
        )
    if beside_weight.shape != (filters, beside.shape[1]):
        raise ValueError(
            f"{op}: beside_weight {list(beside_weight.shape)} does not fit {filters} filters and {beside.shape[1]} "
            f"channels beside; give [{filters}, {beside.shape[1]}]"
        )


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
