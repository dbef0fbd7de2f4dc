"""The convolution over rows on the GPU: see ``row_product_launch``."""

from __future__ import annotations

from typing import Any

import torch

from fisedit_compile.kernels.implicit_gemm.row_product_launch import launch_row_product
from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Library, Tile


def conv2d_rows_triton(*arguments: Any, tile: Tile | Library | None = None, **named: Any) -> torch.Tensor:
    """Convolve at the rows of ``table``; arguments as of the reference in ``conv2d_rows``, on one GPU.

    ``tile`` None takes the best of the nearest size that was measured. Entries of the table are not checked.

    Returns:
        [M, Cout] (half as wide for ``geglu``), contiguous.

    Raises:
        ValueError: arguments that do not fit, or dtypes that differ or that the kernel does not take.
    """
    return launch_row_product("conv2d_rows", *arguments, keep_raw=False, tile=tile, **named)[1]


def conv2d_rows_and_norm_triton(
    *arguments: Any, tile: Tile | Library | None = None, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`conv2d_rows_triton`, with the result both before and after norm and activation."""
    raw, out = launch_row_product("conv2d_rows_and_norm", *arguments, keep_raw=True, tile=tile, **named)
    assert raw is not None
    return raw, out
