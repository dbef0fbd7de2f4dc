"""The choice of tiles: from the nearest size that was measured, and never one that cannot run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.kernels import row_product_tiles
from fisedit_compile.kernels.row_product_tiles import Library, Tile, choose_tile

MEASURED = json.loads(Path(row_product_tiles.__file__).with_name("row_product_tiles.json").read_text())
SHARED_MEMORY = 227 * 1024  # of a Hopper multiprocessor


@pytest.mark.parametrize("entry", MEASURED["best"][::7], ids=lambda e: f"{e['rows_out']}x{e['depth']}")
def test_a_size_that_was_measured_gets_its_best_tile(entry: dict) -> None:
    chosen = choose_tile(
        entry["rows_out"], 1, entry["depth"], entry["filters_out"], torch.bfloat16, geglu=entry["geglu"]
    )
    assert isinstance(chosen, Tile)
    best = {name: entry[name] for name in ("rows", "filters", "channels", "warps", "splits", "second_kernel")}
    assert {name: getattr(chosen, name) for name in best} == best | {"rows": min(entry["rows"], chosen.rows)}


sizes = st.tuples(
    st.integers(1, 40000), st.sampled_from([1, 9]), st.integers(1, 4000), st.integers(1, 12000), st.booleans()
)


@given(sizes, st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_any_size_gets_a_tile_that_fits(size: tuple[int, int, int, int, bool], dtype: torch.dtype) -> None:
    rows, taps, channels, filters, geglu = size
    tile = choose_tile(rows, taps, channels, filters, dtype, geglu=geglu)
    assert isinstance(tile, Tile)
    loaded = (tile.rows + tile.filters * (2 if geglu else 1)) * tile.channels * dtype.itemsize
    assert tile.stages * loaded <= SHARED_MEMORY
    assert min(tile.rows, tile.filters, tile.channels) >= 16
    assert 1 <= tile.splits <= max(1, taps * -(-channels // tile.channels))


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
