"""The convolution of rows on the GPU, as ``kernels/ops.py`` calls it."""

from __future__ import annotations

from typing import Any

import torch

from fisedit_compile.kernels.implicit_gemm.row_product_launch import launch_row_product
from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Library, Tile


def conv2d_rows_triton(*arguments: Any, tile: Tile | Library | None = None, **named: Any) -> torch.Tensor:
    """``conv2d_rows`` on one GPU; its reference describes the arguments. Entries of the table are not checked.

    Args:
        tile: what computes it; None takes the fastest of the nearest size that was measured.

    Returns:
        [M, Cout] (half as wide for ``geglu``), contiguous.

    Raises:
        ValueError: the arguments do not fit each other, or their dtypes differ or are none that the kernel takes.
    """
    return launch_row_product("conv2d_rows", *arguments, keep_raw=False, tile=tile, **named)[1]


def conv2d_rows_and_norm_triton(
    *arguments: Any, tile: Tile | Library | None = None, **named: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """As :func:`conv2d_rows_triton`, with the result both before and after norm and activation."""
    raw, out = launch_row_product("conv2d_rows_and_norm", *arguments, keep_raw=True, tile=tile, **named)
    assert raw is not None
    return raw, out
