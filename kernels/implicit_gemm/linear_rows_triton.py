"""The linear layer of rows on the GPU, as ``kernels/ops.py`` calls it."""

from __future__ import annotations

from typing import Any

import torch

from fisedit_compile.kernels.implicit_gemm.row_product_launch import LayerNorm, launch_row_product
from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Library, Tile


def linear_rows_triton(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *epilogue: Any,
    tile: Tile | Library | None = None,
    **named: Any,
) -> torch.Tensor:
    """``linear_rows`` on one GPU; its reference describes the arguments.

    Args:
        tile: what computes it, a tile or cuBLAS; None takes the fastest of the nearest size that was measured.

    Returns:
        [M, N] (half as wide for ``geglu``), contiguous.

    Raises:
        ValueError: the arguments do not fit each other, or their dtypes differ or are none that the kernel takes.
    """
    product = (rows, None, weight, bias, None)
    return launch_row_product("linear_rows", *product, *epilogue, keep_raw=False, tile=tile, **named)[1]


def linear_rows_and_norm_triton(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *epilogue: Any,
    tile: Tile | Library | None = None,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`linear_rows_triton`, with the result both before and after norm and activation."""
    product = (rows, None, weight, bias, None)
    raw, out = launch_row_product("linear_rows_and_norm", *product, *epilogue, keep_raw=True, tile=tile, **named)
    assert raw is not None
    return raw, out


def linear_rows_and_layer_norm_triton(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    eps: float,
    count: torch.Tensor | None = None,
    *,
    tile: Tile | Library | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``linear_rows_and_layer_norm`` on one GPU; its reference describes the arguments.

    Args:
        tile: as of :func:`linear_rows_triton`.

    Raises:
        ValueError: the arguments do not fit each other, or their dtypes differ or are none that the kernel takes.
    """
    raw, out = launch_row_product(
        "linear_rows_and_layer_norm", rows, None, weight, bias, None, count, residual=residual, keep_raw=True,
        tile=tile, layer_norm=LayerNorm(norm_weight, norm_bias, eps),
    )  # fmt: skip
    assert raw is not None
    return raw, out
