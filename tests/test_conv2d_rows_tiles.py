"""The size heuristic of the convolution's tiles: always a tile that the kernel runs, and the GPU filled."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fisedit_compile.kernels.conv2d_rows_tiles import choose_tile


@given(
    st.integers(1, 40_000),
    st.sampled_from([1, 3, 9]),
    st.integers(1, 2560),
    st.integers(1, 2560),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
)
def test_a_tile_that_the_kernel_runs(rows: int, taps: int, channels: int, filters: int, dtype: torch.dtype) -> None:
    tile = choose_tile(rows, taps, channels, filters, dtype, 132)
    for side in (tile.rows, tile.filters, tile.channels):
        assert side >= 16
        assert side & (side - 1) == 0  # a power of two
    steps = taps * -(-channels // tile.channels)
    assert 1 <= tile.splits <= steps
    assert tile.stages * (tile.rows + tile.filters) * tile.channels * dtype.itemsize <= 220 * 1024


@pytest.mark.parametrize(("rows", "channels"), [(58, 1280), (230, 640), (922, 320)])
def test_small_masks_are_split_until_the_gpu_is_filled(rows: int, channels: int) -> None:
    tile = choose_tile(rows, 9, channels, channels, torch.bfloat16, 132)
    programs = -(-rows // tile.rows) * -(-channels // tile.filters) * tile.splits
    assert tile.splits > 1
    assert programs >= 0.8 * 132


def test_large_maps_are_not_split() -> None:
    assert choose_tile(18432, 9, 320, 320, torch.bfloat16, 132).splits == 1
