"""A linear layer of rows with its epilogue: the product of ``conv2d_rows`` with one tap, the row itself."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fisedit_compile.kernels.implicit_gemm.epilogue import finish_rows_reference
from fisedit_compile.kernels.norms.layer_norm_rows import layer_norm_rows_reference


def linear_rows_reference(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *epilogue: Any, **named: Any
) -> torch.Tensor:
    """``rows [M, K]`` times ``weight [N, K]``, plus ``bias [N]`` or None, through the epilogue.

    Args:
        epilogue, named: ``count, sample, sample_bias, residual, scale, shift, activation``, see ``epilogue``.

    Returns:
        [M, N], or [M, N / 2] for ``geglu``.

    Raises:
        RuntimeError: the shapes or dtypes do not fit.
        ValueError: arguments of the epilogue do not go together.
    """
    return linear_rows_and_norm_reference(rows, weight, bias, *epilogue, **named)[1]


def linear_rows_and_norm_reference(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *epilogue: Any, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`linear_rows_reference`, with the result both before and after norm and activation."""
    return finish_rows_reference(F.linear(rows, weight, bias), *epilogue, **named)


def linear_rows_and_layer_norm_reference(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A linear layer of rows, plus ``residual [M, N]`` or None, and the layer norm of the result.

    Args:
        rows, weight, bias: [M, K], [N, K], [N] or None.
        norm_weight, norm_bias: [N] or None, see ``layer_norm_rows``.
        count: int32 [1], how many rows are real, see ``ops``; the reference computes padded rows as well.

    Returns:
        [M, N] each: the result before and after the norm.
    """
    raw = linear_rows_reference(rows, weight, bias, residual=residual)
    return raw, layer_norm_rows_reference(raw, norm_weight, norm_bias, eps)
