"""Moments over all tiles of a dense map, for recordings that launch no kernels of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.ir.layout import Size
from fisedit_compile.ir.tile_grid import GRID, TILES, pixels_of_tiles_on
from fisedit_compile.kernels.norms.tile_moments import moments_dtype, moments_of_tiles


def moments_of_map(pixels: Tensor, batch: int, size: Size, groups: int) -> Tensor:
    """The moments of all tiles of a map, ``[batch * TILES, groups, 2]``.

    Args:
        pixels: [batch * H * W, C], a row a pixel.
        batch: samples.
        size: (H, W).
        groups: see ``tile_moments``.
    """
    if pixels.is_meta:  # each of some thirty small operations takes longer there than on a CPU
        return pixels.new_empty(batch * TILES, groups, 2, dtype=moments_dtype(pixels.dtype))
    tiles = pixels_of_tiles_on(size, pixels.device)
    first = torch.arange(batch, device=pixels.device).repeat_interleave(TILES)[:, None] * (size[0] * size[1])
    tiles = tiles.repeat(batch, 1)
    padded = any(side % GRID for side in size)
    return moments_of_tiles(pixels, torch.where(tiles >= 0, tiles + first, -1).int(), groups, padded=padded)
