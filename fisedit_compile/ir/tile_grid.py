"""The tiles over which a base keeps moments of its maps: the picture cut into 16 by 16 parts, whatever its size.

At a resolution (H, W) pixel (y, x) lies in tile ``(y * 16 // H) * 16 + x * 16 // W``. Where a side is no multiple of
16 tiles differ by a pixel in height or width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fisedit_compile.ir.layout import Size

#: Tiles along a side: more take more memory of a base, fewer leave small masks without a tile that they cover.
GRID = 16
TILES = GRID * GRID


@lru_cache(maxsize=64)
def pixels_of_tiles(size: Size) -> Tensor:
    """int64 ``[TILES, P]`` on the host: the pixels of each tile in order, ``y * W + x``, padded with -1."""
    height, width = size
    rows = torch.arange(height) * GRID // height
    columns = torch.arange(width) * GRID // width
    tile = (rows[:, None] * GRID + columns[None, :]).flatten()
    order = tile.argsort(stable=True)
    counts = tile.bincount(minlength=TILES)
    table = torch.full((TILES, int(counts.max())), -1)
    place = torch.arange(height * width) - (counts.cumsum(0) - counts)[tile[order]]
    table[tile[order], place] = order
    return table


@lru_cache(maxsize=64)
def sizes_of_tiles(size: Size) -> Tensor:
    """int32 ``[TILES]`` on the host: how many pixels each tile has."""
    return (pixels_of_tiles(size) >= 0).sum(1, dtype=torch.int32)


def most_pixels(size: Size) -> int:
    """Pixels of the largest tile."""
    return -(-size[0] // GRID) * -(-size[1] // GRID)


def fewest_pixels(size: Size) -> int:
    """Pixels of the smallest tile."""
    return (size[0] // GRID) * (size[1] // GRID)
