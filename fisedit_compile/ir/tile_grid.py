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
    return pixels_of_tiles_on(size, torch.device("cpu"))


def pixels_of_tiles_on(size: Size, device: torch.device) -> Tensor:
    """:func:`pixels_of_tiles`, computed on a device without copies to it, as a CUDA graph needs that captures it."""
    (top, heights), (left, widths) = _sides(size[0], device), _sides(size[1], device)
    top, heights = top[:, None, None], heights[:, None, None]  # [GRID, 1, 1]
    left, widths = left[None, :, None], widths[None, :, None]  # [1, GRID, 1]
    place = torch.arange(most_pixels(size), device=device)
    wide = widths.clamp_min(1)
    pixel = (top + place // wide) * size[1] + left + place % wide
    return torch.where(place < heights * widths, pixel, -1).view(TILES, -1)


def _sides(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 ``[GRID]`` each: the first pixel of each tile along a side, and how many it has."""
    edges = (torch.arange(GRID + 1, device=device) * length + GRID - 1) // GRID
    return edges[:-1], edges[1:] - edges[:-1]


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
