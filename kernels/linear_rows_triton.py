"""The linear layer of rows on the GPU: see ``row_product_triton``."""

from __future__ import annotations

import torch

from fisedit_compile.kernels.row_product_launch import launch_row_product
from fisedit_compile.kernels.row_product_tiles import Library, Tile


def linear_rows_triton(
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
    tile: Tile | Library | None = None,
) -> torch.Tensor:
    """Multiply rows; arguments as of the reference in ``linear_rows``, on one GPU.

    ``tile`` None takes the one that the size heuristic picks.

    Returns:
        [M, N] (half as wide for ``geglu``), contiguous.

    Raises:
        ValueError: arguments that do not fit, or dtypes that differ or that the kernel does not take.
    """
    _, out = launch_row_product(
        "linear_rows", rows, None, weight, bias, None, count, sample, sample_bias, residual, scale, shift, activation,
        keep_raw=False, tile=tile,
    )  # fmt: skip
    return out


def linear_rows_and_norm_triton(
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
    tile: Tile | Library | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`linear_rows_triton`, with the result both before and after norm and activation."""
    raw, out = launch_row_product(
        "linear_rows_and_norm", rows, None, weight, bias, None, count, sample, sample_bias, residual, scale, shift,
        activation, keep_raw=True, tile=tile,
    )  # fmt: skip
    assert raw is not None
    return raw, out
