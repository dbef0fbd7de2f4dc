"""A linear layer of rows with what follows it: the product of ``conv2d_rows`` with one tap, the row itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fisedit_compile.kernels.epilogue import check_epilogue, normed_rows_reference, raw_rows_reference


def linear_rows_reference(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    count: torch.Tensor | None = None,
    sample: torch.Tensor | None = None,
    sample_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """``rows [M, K]`` times ``weight [N, K]``, plus ``bias [N]`` or None, through the epilogue.

    Args:
        count: int32 [1], see ``ops``; not read here.
        sample, sample_bias, residual, scale, shift, activation: see ``epilogue``.

    Returns:
        [M, N], or [M, N / 2] for ``geglu``.

    Raises:
        RuntimeError: the shapes or dtypes do not fit.
        ValueError: arguments of the epilogue that do not go together.
    """
    check_epilogue("linear_rows", sample, sample_bias, residual, scale, shift, activation)
    raw = raw_rows_reference(F.linear(rows, weight, bias), sample, sample_bias, residual)
    return normed_rows_reference(raw, sample, scale, shift, activation)


def linear_rows_and_norm_reference(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    count: torch.Tensor | None = None,
    sample: torch.Tensor | None = None,
    sample_bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    activation: str = "none",
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`linear_rows_reference`, with the result both before and after norm and activation."""
    check_epilogue("linear_rows_and_norm", sample, sample_bias, residual, scale, shift, activation)
    raw = raw_rows_reference(F.linear(rows, weight, bias), sample, sample_bias, residual)
    normed = normed_rows_reference(raw, sample, scale, shift, activation)
    return raw, normed
