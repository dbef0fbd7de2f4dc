"""The product of rows in Triton's interpreter, convolution and linear layer, against the references in fp64."""

from __future__ import annotations

import pytest
import torch
from support.interpreter import INTERPRETED_DTYPES, MARKS
from support.random_rows import normal
from support.row_products import EPILOGUES, check, conv_arguments, epilogue, linear_arguments

from fisedit_compile.kernels.implicit_gemm.conv2d_rows import conv2d_rows_and_norm_reference, conv2d_rows_reference
from fisedit_compile.kernels.implicit_gemm.linear_rows import (
    linear_rows_and_layer_norm_reference,
    linear_rows_and_norm_reference,
    linear_rows_reference,
)
from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Library, Tile
from fisedit_compile.kernels.launch.semaphores import new_semaphores, semaphores, use_semaphores
from fisedit_compile.testing import assert_close

conv = pytest.importorskip("fisedit_compile.kernels.implicit_gemm.conv2d_rows_triton", reason="Triton is not installed")
linear = pytest.importorskip(
    "fisedit_compile.kernels.implicit_gemm.linear_rows_triton", reason="Triton is not installed"
)
product = pytest.importorskip(
    "fisedit_compile.kernels.implicit_gemm.row_product_launch", reason="Triton is not installed"
)
pytestmark = MARKS

WHOLE, SPLIT = Tile(32, 16, 16, 4, 2), Tile(16, 32, 16, 4, 2, splits=3)
APART = Tile(16, 16, 16, 4, 2, splits=2, second_kernel=True)
TILES = {"whole": WHOLE, "split": SPLIT, "second kernel": APART}
LINEAR_TILES = TILES | {"library": Library()}
tiles = pytest.mark.parametrize("tile", TILES.values(), ids=TILES)
linear_tiles = pytest.mark.parametrize("tile", LINEAR_TILES.values(), ids=LINEAR_TILES)
dtypes = pytest.mark.parametrize("dtype", INTERPRETED_DTYPES, ids=str)


@dtypes
@tiles
@pytest.mark.parametrize(("channels", "halo"), [(16, None), (21, None), (16, 0), (16, 9), (21, 9)])
def test_convolution(dtype: torch.dtype, tile: Tile, channels: int, halo: int | None) -> None:
    check(conv.conv2d_rows_triton, conv2d_rows_reference, conv_arguments(dtype, 37, 29, halo, channels, 20), tile)


@dtypes
@tiles
@pytest.mark.parametrize(
    ("channels", "shortcut_channels", "halo"),
    [(16, 32, 9), (16, 21, 9), (21, 16, 9), (21, 5, 9), (21, 21, None)],
)
def test_a_convolution_with_a_shortcut(
    dtype: torch.dtype, tile: Tile, channels: int, shortcut_channels: int, halo: int | None
) -> None:
    arguments = conv_arguments(dtype, 37, 29, halo, channels, 20, taps=4, shortcut_channels=shortcut_channels)
    check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)


@tiles
def test_a_split_of_the_shortcut_alone(tile: Tile) -> None:
    for taps, shortcut_channels in ((1, 80), (2, 200)):
        arguments = conv_arguments(torch.float32, 37, 29, 9, 16, 20, taps, shortcut_channels)
        check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)


@tiles
@pytest.mark.parametrize("parts", EPILOGUES.values(), ids=EPILOGUES)
def test_every_epilogue_behind_a_shortcut(tile: Tile, parts: set[str]) -> None:
    arguments = conv_arguments(torch.float16, 41, 41, 9, 16, 24, taps=3, shortcut_channels=21)
    arguments |= epilogue(parts, 41, 24, torch.float16)
    check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)
    if "geglu" not in parts:
        check(conv.conv2d_rows_and_norm_triton, conv2d_rows_and_norm_reference, arguments, tile)


@dtypes
@tiles
@pytest.mark.parametrize("channels", [16, 21, 80])
def test_linear_layer(dtype: torch.dtype, tile: Tile, channels: int) -> None:
    arguments = {
        "rows": normal(37, channels, dtype=dtype, seed=1),
        "weight": normal(20, channels, dtype=dtype, seed=2) / channels**0.5,
        "bias": None,
    }
    check(linear.linear_rows_triton, linear_rows_reference, arguments, tile)


@dtypes
@tiles
@pytest.mark.parametrize("parts", EPILOGUES.values(), ids=EPILOGUES)
def test_every_epilogue(dtype: torch.dtype, tile: Tile, parts: set[str]) -> None:
    arguments = conv_arguments(dtype, 41, 41, 9, 32, 24, taps=3) | epilogue(parts, 41, 24, dtype)
    check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)
    if "geglu" not in parts:
        check(conv.conv2d_rows_and_norm_triton, conv2d_rows_and_norm_reference, arguments, tile)


@dtypes
@linear_tiles
@pytest.mark.parametrize("parts", EPILOGUES.values(), ids=EPILOGUES)
def test_every_epilogue_of_a_linear_layer(dtype: torch.dtype, tile: Tile | Library, parts: set[str]) -> None:
    arguments = linear_arguments(dtype, 41, 32, 24) | epilogue(parts, 41, 24, dtype)
    check(linear.linear_rows_triton, linear_rows_reference, arguments, tile)
    if "geglu" not in parts:
        check(linear.linear_rows_and_norm_triton, linear_rows_and_norm_reference, arguments, tile)


@dtypes
@linear_tiles
@pytest.mark.parametrize(("real", "width", "affine"), [(41, 24, True), (0, 24, True), (17, 33, False)])
def test_a_layer_norm_behind_a_linear_layer(
    dtype: torch.dtype, tile: Tile | Library, real: int, width: int, affine: bool
) -> None:
    vectors = [normal(width, dtype=dtype, seed=seed) if affine else None for seed in (3, 4, 5)]
    rows, residual = normal(41, 32, dtype=dtype, seed=1), normal(41, width, dtype=dtype, seed=6) * 2 + 1
    rows[real:] = residual[real:] = torch.nan
    arguments = {
        "rows": rows, "weight": normal(width, 32, dtype=dtype, seed=2) / 32**0.5, "bias": vectors[0],
        "residual": residual, "norm_weight": vectors[1], "norm_bias": vectors[2], "eps": 1e-5,
        "count": torch.tensor([real], dtype=torch.int32),
    }  # fmt: skip
    check(linear.linear_rows_and_layer_norm_triton, linear_rows_and_layer_norm_reference, arguments, tile, real)


@tiles
@pytest.mark.parametrize("real", [0, 1, 16, 33, 70, 80])
def test_padding_is_not_computed(tile: Tile, real: int) -> None:
    parts = EPILOGUES["all"]
    arguments = conv_arguments(torch.float32, 70, 50, 9, 32, 24) | epilogue(parts, 70, 24, torch.float32)
    arguments["residual"][real:] = torch.nan
    arguments["table"][real:] = -1
    arguments["count"] = torch.tensor([real], dtype=torch.int32)
    check(conv.conv2d_rows_and_norm_triton, conv2d_rows_and_norm_reference, arguments, tile, real)


@linear_tiles
@pytest.mark.parametrize("real", [0, 1, 16, 33, 70, 80])
def test_padding_of_a_linear_layer_is_not_computed(tile: Tile | Library, real: int) -> None:
    arguments = linear_arguments(torch.float32, 70, 32, 24) | epilogue(EPILOGUES["all"], 70, 24, torch.float32)
    for name in ("rows", "residual"):
        arguments[name][real:] = torch.nan
    arguments["count"] = torch.tensor([real], dtype=torch.int32)
    check(linear.linear_rows_triton, linear_rows_reference, arguments, tile, real)


@tiles
@pytest.mark.parametrize("real", [0, 1, 17, 33, 70])
def test_padding_of_a_shortcut_is_not_read(tile: Tile, real: int) -> None:
    arguments = conv_arguments(torch.float32, 70, 50, 9, 16, 24, shortcut_channels=21)
    arguments["shortcut"][real:] = torch.nan
    arguments["table"][real:] = -1
    arguments["count"] = torch.tensor([real], dtype=torch.int32)
    check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile, real)


@dtypes
@pytest.mark.parametrize(("channels", "filters"), [(4, 40), (48, 4)])
def test_the_channels_of_latents_with_the_tile_of_the_heuristic(
    dtype: torch.dtype, channels: int, filters: int
) -> None:
    for shortcut_channels in (0, 12):
        arguments = conv_arguments(dtype, 70, 61, 9, channels, filters, shortcut_channels=shortcut_channels)
        check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, None)


@tiles
def test_one_row_one_tap_and_no_bias(tile: Tile) -> None:
    for count, rows, taps in ((1, 1, 9), (5, 7, 1)):
        arguments = conv_arguments(torch.float32, count, rows, None, 48, 5, taps) | {"bias": None}
        check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)


def test_more_tiles_of_rows_than_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product, "_GROUP", 2)
    arguments = conv_arguments(torch.float32, 70, 30, 3, 8, 40, 2)
    for splits in (1, 2):
        check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, Tile(16, 16, 8, 4, 2, splits))


@pytest.mark.parametrize("splits", [1, 3])
def test_no_active_rows(splits: int) -> None:
    tile = Tile(16, 16, 16, 4, 2, splits=splits)
    for count, rows in ((6, 0), (0, 5)):  # the halo alone; nothing to compute
        check(conv.conv2d_rows_triton, conv2d_rows_reference, conv_arguments(torch.float32, count, rows, 4, 8, 8), tile)
    rows, bias = torch.empty(0, 8), torch.arange(8.0)
    table = torch.full((3, 9), -1, dtype=torch.int32)  # nothing inside the picture
    out = conv.conv2d_rows_triton(rows, None, torch.ones(8, 72), bias, table, tile=tile)
    assert torch.equal(out, bias.expand(3, 8))
    for count, active in ((6, 0), (0, 5)):
        arguments = conv_arguments(torch.float32, count, active, 4, 8, 8, shortcut_channels=21)
        check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)
    shortcut, weight = normal(3, 21, dtype=torch.float32, seed=0), normal(8, 21, dtype=torch.float32, seed=1)
    given = {"shortcut": shortcut, "shortcut_weight": weight}
    out = conv.conv2d_rows_triton(rows, None, torch.ones(8, 72), bias, table, **given, tile=tile)
    assert_close(out, shortcut.double() @ weight.double().t() + bias)  # the shortcut alone


@tiles
def test_strided_inputs(tile: Tile) -> None:
    rows, weight = normal(9, 64, dtype=torch.float32, seed=0), normal(72, 8, dtype=torch.float32, seed=1)
    table = torch.randint(-1, 9, (9, 8)).int()[:, :4]
    for given in (rows[:, ::4], rows[:, 16:32]):  # a copy; a piece of a merged product, in place
        arguments = {"rows": given, "halo": None, "weight": weight[:64].t(), "bias": None, "table": table}
        check(conv.conv2d_rows_triton, conv2d_rows_reference, arguments, tile)
        plain = {"rows": given, "weight": weight[:16].t(), "bias": None}
        check(linear.linear_rows_triton, linear_rows_reference, plain, tile)
    arguments = conv_arguments(torch.float32, 9, 9, None, 16, 8, shortcut_channels=16)
    for given in (normal(9, 64, dtype=torch.float32, seed=2)[:, ::4], normal(16, 9, dtype=torch.float32, seed=3).t()):
        strided = arguments | {"shortcut": given, "shortcut_weight": arguments["shortcut_weight"].t().contiguous().t()}
        check(conv.conv2d_rows_triton, conv2d_rows_reference, strided, tile)


def test_counters_of_ones_own() -> None:
    own = new_semaphores(torch.device("cpu"))
    assert semaphores(torch.device("cpu"), 1) is not own
    with use_semaphores(own):
        assert semaphores(torch.device("cpu"), 1) is own
    assert semaphores(torch.device("cpu"), 1) is not own
    with pytest.raises(ValueError, match="without splits"):
        semaphores(torch.device("cpu"), 10**6)


def test_refuses_what_does_not_fit() -> None:
    rows, weight, table = torch.zeros(2, 8), torch.zeros(4, 72), torch.zeros(2, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match="float16, float32"):
        conv.conv2d_rows_triton(rows.half(), None, weight, None, table)
    with pytest.raises(ValueError, match=r"give \[Cout, 72\]"):
        conv.conv2d_rows_triton(rows, None, weight[:, :9], None, table)
    shortcut, shortcut_weight = torch.zeros(2, 5), torch.zeros(4, 5)
    for given in ((shortcut.half(), shortcut_weight), (shortcut, shortcut_weight.half())):
        with pytest.raises(ValueError, match="float16, float32"):
            conv.conv2d_rows_triton(rows, None, weight, None, table, shortcut=given[0], shortcut_weight=given[1])
    for other in (shortcut_weight[:3], shortcut_weight[:, :4], torch.zeros(5, 4)):
        with pytest.raises(ValueError, match=r"shortcut_weight \[\d, \d\] does not fit .*; give \[4, 5\]"):
            conv.conv2d_rows_triton(rows, None, weight, None, table, shortcut=shortcut, shortcut_weight=other)
    # Of the first, rows past its end would be read.
    for other in (shortcut[:1], torch.zeros(3, 5)):
        with pytest.raises(
            ValueError, match=r"[13] rows of a shortcut for a convolution of 2; give one for each output row"
        ):
            conv.conv2d_rows_triton(rows, None, weight, None, table, shortcut=other, shortcut_weight=shortcut_weight)
    for given in ((shortcut, None), (None, shortcut_weight)):
        with pytest.raises(ValueError, match="belong together"):
            conv.conv2d_rows_triton(rows, None, weight, None, table, shortcut=given[0], shortcut_weight=given[1])
    with pytest.raises(ValueError, match="needs the neighbour table"):
        linear.linear_rows_triton(rows, weight[:, :8], None, shortcut=shortcut, shortcut_weight=shortcut_weight)
    with pytest.raises(ValueError, match="give the sample of each row"):
        conv.conv2d_rows_triton(rows, None, weight, None, table, sample_bias=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="give both or neither"):
        linear.linear_rows_triton(rows, weight[:, :8], None, scale=torch.zeros(1, 4))
    with pytest.raises(ValueError, match="geglu halves the width"):
        linear.linear_rows_triton(rows, weight[:, :8], None, residual=torch.zeros(2, 4), activation="geglu")
    with pytest.raises(ValueError, match="another width"):
        linear.linear_rows_and_norm_triton(rows, weight[:, :8], None, activation="geglu")
    with pytest.raises(ValueError, match="'none', 'silu' or 'geglu'"):
        linear.linear_rows_triton(rows, weight[:, :8], None, activation="relu")
