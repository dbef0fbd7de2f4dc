"""Tiles with two parts of rows, or with filters down the product, in Triton's interpreter against the references.

``test_triton_row_product`` holds the product itself with plain tiles.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.interpreter import INTERPRETED_DTYPES, MARKS
from support.random_rows import normal
from support.row_products import EPILOGUES, Arguments, check, conv_arguments, epilogue, linear_arguments

from fisedit_compile.kernels.implicit_gemm.conv2d_rows import conv2d_rows_and_norm_reference, conv2d_rows_reference
from fisedit_compile.kernels.implicit_gemm.linear_rows import (
    linear_rows_and_layer_norm_reference,
    linear_rows_reference,
)
from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Tile

conv = pytest.importorskip("fisedit_compile.kernels.implicit_gemm.conv2d_rows_triton", reason="Triton is not installed")
linear = pytest.importorskip(
    "fisedit_compile.kernels.implicit_gemm.linear_rows_triton", reason="Triton is not installed"
)
product = pytest.importorskip(
    "fisedit_compile.kernels.implicit_gemm.row_product_launch", reason="Triton is not installed"
)
pytestmark = MARKS

ACROSS = {
    "across": Tile(64, 16, 16, 4, 2, across=True),
    "across, split": Tile(32, 32, 16, 4, 2, splits=3, across=True),
    "across, second kernel": Tile(64, 32, 16, 4, 2, splits=2, second_kernel=True, across=True),
    "across, in halves": Tile(64, 64, 16, 1, 2, across=True),
}
TWO_PARTS = {
    "48 rows": Tile(48, 32, 16, 4, 2),
    "48 rows, split": Tile(48, 32, 16, 4, 2, splits=3),  # a second kernel all the same
    "48 rows, second kernel": Tile(48, 32, 16, 4, 2, splits=2, second_kernel=True),
    "48 rows, in halves": Tile(48, 64, 16, 1, 2),
    "80 rows across": Tile(80, 32, 16, 4, 2, across=True),
    "80 rows across, split": Tile(80, 32, 16, 4, 2, splits=3, across=True),
    "80 rows across, second kernel": Tile(80, 32, 16, 4, 2, splits=2, second_kernel=True, across=True),
    "80 rows across, in halves": Tile(80, 64, 16, 1, 2, across=True),
}
TILES = ACROSS | TWO_PARTS
tiles = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
across = pytest.mark.parametrize("tile", ACROSS.values(), ids=ACROSS)
two_parts = pytest.mark.parametrize("tile", TWO_PARTS.values(), ids=TWO_PARTS)
dtypes = pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)

#: The last tile ends in its second part (48 rows), or with its first (80 rows).
ROWS = 2 * 48 + 38


def convolution(dtype: torch.dtype, parts: set[str], shortcut_channels: int = 0) -> Arguments:
    arguments = conv_arguments(dtype, ROWS, 61, 9, 21, 40, taps=3, shortcut_channels=shortcut_channels)
    return arguments | epilogue(parts, ROWS, 40, dtype)


@dtypes
@tiles
def test_convolution(dtype: torch.dtype, tile: Tile) -> None:
    for shortcut_channels in (0, 12):
        arguments = convolution(dtype, set(), shortcut_channels)
        check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)


@tiles
@pytest.mark.parametrize(("dtype", "channels"), [(torch.float16, 64), (torch.float32, 69)], ids=str)
def test_linear_layer(dtype: torch.dtype, tile: Tile, channels: int) -> None:
    arguments = linear_arguments(dtype, ROWS, channels, 40)
    check(linear.linear_rows_triton, linear_rows_reference, arguments, tile)


@tiles
@pytest.mark.parametrize("parts", ["residual", "all"])
def test_an_epilogue(tile: Tile, parts: str) -> None:
    arguments = convolution(torch.float32, EPILOGUES[parts])
    check(conv.conv2d_rows_and_norm_triton, conv2d_rows_and_norm_reference, arguments, tile)
    arguments = linear_arguments(torch.float32, ROWS, 48, 40) | epilogue(EPILOGUES[parts], ROWS, 40, torch.float32)
    check(linear.linear_rows_triton, linear_rows_reference, arguments, tile)


@across
def test_geglu(tile: Tile) -> None:
    arguments = linear_arguments(torch.float16, ROWS, 69, 80) | {"activation": "geglu"}
    check(linear.linear_rows_triton, linear_rows_reference, arguments, tile)
    arguments = convolution(torch.float32, {"geglu"}, shortcut_channels=12)
    check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)


@two_parts
def test_geglu_takes_no_tile_of_two_parts(tile: Tile) -> None:
    arguments = linear_arguments(torch.float32, 5, 16, 8) | {"activation": "geglu"}
    with pytest.raises(ValueError, match="give a power of two"):
        linear.linear_rows_triton(**arguments, tile=tile)


@tiles
@pytest.mark.parametrize("real", [0, 40, 64, 70])
def test_padding_is_not_computed(tile: Tile, real: int) -> None:
    """Where the last real row is in either part of a tile, or the last of a part."""
    arguments = convolution(torch.float32, EPILOGUES["all"], shortcut_channels=12)
    for name in ("residual", "shortcut"):
        arguments[name][real:] = torch.nan
    arguments["table"][real:] = -1
    count = {"count": torch.tensor([real], dtype=torch.int32)}
    check(conv.conv2d_rows_and_norm_triton, conv2d_rows_and_norm_reference, arguments | count, tile, real)
    plain = linear_arguments(torch.float32, ROWS, 48, 40)
    plain["rows"][real:] = torch.nan
    check(linear.linear_rows_triton, linear_rows_reference, plain | count, tile, real)


@two_parts
@pytest.mark.parametrize("real", [30, 64])
def test_nothing_is_read_for_a_part_without_a_real_row(tile: Tile, real: int) -> None:
    """What lies in memory before the vectors of the first sample would overflow where it is computed with."""
    arguments = convolution(torch.float32, EPILOGUES["all"])
    for name in ("sample_bias", "scale", "shift"):
        before = torch.full((1, 40), torch.finfo(torch.float32).max)
        arguments[name] = torch.cat([before, arguments[name]])[1:]
    arguments["count"] = torch.tensor([real], dtype=torch.int32)
    with np.errstate(over="raise"):
        check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile, real)


@two_parts
def test_a_layer_norm_behind_a_linear_layer(tile: Tile) -> None:
    weight, bias, residual = (normal(*size, 40, dtype=torch.float32, seed=5) for size in ((), (), (ROWS,)))
    norm = {"residual": residual, "norm_weight": weight, "norm_bias": bias, "eps": 1e-5}
    arguments = linear_arguments(torch.float32, ROWS, 48, 40) | norm
    check(linear.linear_rows_and_layer_norm_triton, linear_rows_and_layer_norm_reference, arguments, tile)


@two_parts
def test_fewer_rows_than_the_first_part_and_no_bias(tile: Tile) -> None:
    for count in (1, 32):
        arguments = conv_arguments(torch.float32, count, 7, None, 48, 5, taps=2) | {"bias": None}
        check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)


@two_parts
def test_more_tiles_of_rows_than_a_group(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_GROUP", 2)
    arguments = conv_arguments(torch.float32, 300, 30, 3, 16, 70, taps=1, shortcut_channels=16)
    check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_tile_as_large_as_on_a_gpu(splits: int) -> None:
    """Of 256 and 32 rows, in halves; the last of three tiles has rows of its first part alone."""
    tile = Tile(288, 128, 64, 8, 3, splits=splits, second_kernel=True, across=True)
    arguments = conv_arguments(torch.float16, 600, 500, 40, 64, 200, shortcut_channels=96)
    arguments |= epilogue(EPILOGUES["all"], 600, 200, torch.float16)
    check(conv.conv2d_rows_and_norm_triton, conv2d_rows_and_norm_reference, arguments, tile)
