"""The tiles over which a base keeps moments of its maps."""

from __future__ import annotations

import pytest
import torch

from fisedit_compile.ir.tile_grid import GRID, TILES, fewest_pixels, most_pixels, pixels_of_tiles, sizes_of_tiles


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (24, 24), (17, 31), (16, 16), (13, 10), (1, 1)])
def test_each_pixel_lies_in_one_tile(size: tuple[int, int]) -> None:
    pixels, sizes = pixels_of_tiles(size), sizes_of_tiles(size)
    assert sorted(pixels[pixels >= 0].tolist()) == list(range(size[0] * size[1]))
    assert int(sizes.sum()) == size[0] * size[1]
    assert (len(pixels), len(sizes)) == (TILES, TILES)
    assert pixels.shape[1] <= most_pixels(size)
    assert fewest_pixels(size) == int(sizes.min())
    for tile, of_tile in enumerate(pixels.tolist()):
        for pixel in of_tile[: int(sizes[tile])]:
            y, x = divmod(pixel, size[1])
            assert (y * GRID // size[0]) * GRID + x * GRID // size[1] == tile
        assert of_tile[: int(sizes[tile])] == sorted(of_tile[: int(sizes[tile])])


def test_levels_of_a_picture_cover_the_same_parts_of_it() -> None:
    """A tile that a mask covers at one resolution is covered at the next, which is any-pooled."""
    fine, coarse = (torch.empty(size, dtype=torch.int64) for size in ((96, 64), (48, 32)))
    for maps, size in ((fine, (96, 64)), (coarse, (48, 32))):
        for tile, pixels in enumerate(pixels_of_tiles(size)):
            maps.view(-1)[pixels[pixels >= 0]] = tile
    assert torch.equal(fine[::2, ::2], coarse)
