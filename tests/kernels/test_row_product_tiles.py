"""The choice of tiles: from the nearest size that was measured, and never one that cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.kernels.implicit_gemm import row_product_tiles
from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Library, Tile, choose_tile

MEASURED = json.loads(Path(row_product_tiles.__file__).with_name("row_product_tiles.json").read_text())
SHARED_MEMORY = 227 * 1024  # of a Hopper multiprocessor


@pytest.mark.parametrize("entry", MEASURED["best"][::7], ids=lambda e: f"{e['rows_out']}x{e['depth']}")
def test_a_size_that_was_measured_gets_its_best_tile(entry: dict) -> None:
    chosen = choose_tile(
        entry["rows_out"], 1, entry["depth"], entry["filters_out"], torch.bfloat16, geglu=entry["geglu"]
    )
    assert isinstance(chosen, Tile)
    best = {name: entry[name] for name in ("rows", "filters", "channels", "warps", "splits", "second_kernel")}
    best |= {"rows": min(entry["rows"], chosen.rows), "across": entry["across"]}
    assert {name: getattr(chosen, name) for name in best} == best


sizes = st.tuples(
    st.integers(1, 40000), st.sampled_from([1, 9]), st.integers(1, 4000), st.integers(1, 12000), st.booleans()
)


dtypes = st.sampled_from([torch.bfloat16, torch.float16, torch.float32])


def assert_can_run(tile: Tile, dtype: torch.dtype, geglu: bool) -> None:
    """Its operands fit the shared memory, and each part of its rows is one that a matrix unit takes."""
    loaded = (tile.rows + tile.filters * (2 if geglu else 1)) * tile.channels * dtype.itemsize
    assert tile.stages * loaded <= SHARED_MEMORY
    parts = powers_of_two(tile.rows)
    assert len(parts) <= (1 if geglu or dtype == torch.float32 else 2)
    assert min(*parts, tile.filters, tile.channels) >= 16


def powers_of_two(n: int) -> list[int]:
    """Those that ``n`` is the sum of."""
    return [1 << bit for bit in range(n.bit_length()) if n >> bit & 1]


@given(sizes, dtypes, st.sampled_from([0, 1, 320, 2560]))
def test_any_size_gets_a_tile_that_fits(
    size: tuple[int, int, int, int, bool], dtype: torch.dtype, shortcut_channels: int
) -> None:
    rows, taps, channels, filters, geglu = size
    tile = choose_tile(rows, taps, channels, filters, dtype, shortcut_channels=shortcut_channels, geglu=geglu)
    assert isinstance(tile, Tile)
    assert_can_run(tile, dtype, geglu)
    steps = taps * -(-channels // tile.channels) + -(-shortcut_channels // tile.channels)
    assert 1 <= tile.splits <= max(1, steps)


#: Rows of a tile in two parts or one, as a sweep may find the best.
tile_rows = st.sampled_from([16, 48, 64, 80, 96, 144, 160, 192, 256, 272, 288])


@given(sizes, dtypes, tile_rows, st.sampled_from([64, 128]), st.booleans())
def test_any_tile_of_a_sweep_is_fitted_to_any_size(
    size: tuple[int, int, int, int, bool], dtype: torch.dtype, height: int, width: int, across: bool
) -> None:
    rows, taps, channels, filters, geglu = size
    best = Tile(height, width, 64, 8, 3, splits=4, across=across)
    tile = row_product_tiles.fit_tile(best, rows, taps, channels, filters, dtype, geglu)
    assert_can_run(tile, dtype, geglu)
    assert tile.across == across
    assert tile.rows <= height
    if dtype != torch.float32 and not geglu and rows > height:
        assert tile.rows == height  # whatever sum it is


@pytest.mark.parametrize(("rows", "more"), [(16, 0), (48, 16), (80, 16), (96, 32), (256, 0), (288, 32)])
def test_the_second_part_of_a_tile(rows: int, more: int) -> None:
    assert Tile(rows, 64, 64, 4, 3).more_rows == more


def test_a_shortcut_counts_as_depth() -> None:
    counts, size = range(100, 4000, 100), (640, 640, torch.bfloat16)
    for taps in (1, 9):
        joined = [choose_tile(rows, taps, *size, shortcut_channels=(19 - taps) * 640) for rows in counts]
        assert joined == [choose_tile(rows, 19, *size) for rows in counts]
        assert joined != [choose_tile(rows, taps, *size) for rows in counts]


def test_sizes_far_over_those_measured_are_not_split() -> None:
    deep = (9, 2560, 1280)  # split at every number of rows that was measured
    assert all(choose_tile(rows, *deep, torch.bfloat16).splits > 1 for rows in (200, 1200, 2048))
    for rows, filters in ((50_000, 1280), (2048, 40_000)):
        assert choose_tile(rows, 9, 2560, filters, torch.bfloat16).splits == 1


def test_the_library_only_where_it_can_and_is_faster() -> None:
    many = (9000, 1, 1280, 3840)
    assert choose_tile(*many, torch.bfloat16, linear=True, plain=True) == Library()
    assert isinstance(choose_tile(*many, torch.bfloat16, plain=True), Tile)  # a convolution
    assert isinstance(choose_tile(*many, torch.float32, linear=True, plain=True), Tile)
    for entry in MEASURED["best"]:
        size = (entry["rows_out"], 1, entry["depth"], entry["filters_out"], torch.bfloat16)
        plain = choose_tile(*size, geglu=entry["geglu"], linear=True, plain=True)
        assert (plain == Library()) == (entry["library_us"] < entry["us"])
        if choose_tile(*size, geglu=entry["geglu"], linear=True) == Library():
            assert plain == Library()  # an epilogue of its own only adds to it
