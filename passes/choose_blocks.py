"""Adaptive pixel-wise sparse convolution (APSC): the block that covers a mask at the least cost (paper, A.1).

A convolution of kernel ``(hk, wk)`` is computed in input blocks of ``(h, w)`` pixels, each giving an output tile of
``(h - hk + 1, w - wk + 1)``. Tiles lie side by side from the top left corner of the map, and a tile is computed if it
holds an active pixel. The block chosen minimises ``f(h, w) = (h - hk + 1) (w - wk + 1) N(h, w, mask)`` with N the
number of such tiles: the output pixels that are computed.

As printed, f is zero for h = 2 under a 3x3 kernel, which gives no output at all: those sizes are no candidates here.
The tiles that remain for 3x3 have sides 2, 6, 14 and 30. All grids start at the corner and 2 divides the others, so a
tile of any size is a union of 2x2 tiles and no block has a lesser objective than 4x4: larger ones can only tie.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile.neighbour_table import Size

#: The paper's candidates, {2, 4, 8, 16, 32} squared.
PAPER_BLOCKS: tuple[Size, ...] = tuple((h, w) for h in (2, 4, 8, 16, 32) for w in (2, 4, 8, 16, 32))


@dataclass(frozen=True)
class BlockCandidate:
    """One block size and what it costs for a mask.

    Attributes:
        block: input block (h, w).
        tile: its output (h - hk + 1, w - wk + 1).
        tiles: N(h, w, mask), tiles with an active pixel over all samples.
        objective: f(h, w), output pixels computed, those of a tile beyond the map's edge included.
    """

    block: Size
    tile: Size
    tiles: int
    objective: int

    @property
    def loaded(self) -> int:
        """Input pixels that the blocks read, ``h * w * N``."""
        return self.block[0] * self.block[1] * self.tiles


@dataclass(frozen=True)
class BlockChoice:
    """The block chosen for a kernel and a mask, and every candidate that it was chosen from."""

    kernel: Size
    chosen: BlockCandidate
    candidates: tuple[BlockCandidate, ...]

    def __str__(self) -> str:
        lines = [f"kernel {_x(self.kernel)}: {'block':>7} {'tile':>7} {'tiles':>8} {'objective':>10}"]
        for c in self.candidates:
            mark = "  <- chosen" if c is self.chosen else ""
            lines.append(f"            {_x(c.block):>7} {_x(c.tile):>7} {c.tiles:>8} {c.objective:>10}{mark}")
        return "\n".join(lines)


def output_tile(block: Size, kernel: Size) -> Size:
    """The output tile ``(h - hk + 1, w - wk + 1)`` of a block.

    Raises:
        ValueError: the block is smaller than the kernel, so that it has no output.
    """
    tile = block[0] - kernel[0] + 1, block[1] - kernel[1] + 1
    if min(kernel) < 1 or min(tile) < 1:
        raise ValueError(
            f"a block of {_x(block)} under a kernel of {_x(kernel)} has no output (tile {_x(tile)}); "
            f"give a block of at least the kernel's size, or {_x(kernel)} itself for pixel-exact 1x1 tiles"
        )
    return tile


def active_tiles(mask: Tensor, tile: Size) -> Tensor:
    """bool ``[n, ceil(h / tile_h), ceil(w / tile_w)]``: the tiles of bool ``mask [n, h, w]`` with an active pixel."""
    height, width = mask.shape[1:]
    padded = F.pad(mask, (0, -width % tile[1], 0, -height % tile[0]))
    down, across = padded.shape[1] // tile[0], padded.shape[2] // tile[1]
    return padded.reshape(-1, down, tile[0], across, tile[1]).any(4).any(2)


def expand_to_tiles(mask: Tensor, tile: Size) -> Tensor:
    """bool ``[n, h, w]``: the union of the tiles that hold an active pixel of bool ``mask [n, h, w]``."""
    tiles = active_tiles(mask, tile)
    return tiles.repeat_interleave(tile[0], 1).repeat_interleave(tile[1], 2)[:, : mask.shape[1], : mask.shape[2]]


def choose_block(mask: Tensor, kernel: Size, blocks: Collection[Size] | None = None) -> BlockChoice:
    """The block that minimises the paper's objective for all samples of a mask together.

    Between blocks of equal objective the one that reads fewer input pixels wins (larger blocks share more halo), then
    the smaller one.

    Args:
        mask: active output pixels of the convolution, bool ``[n, h, w]``.
        kernel: (hk, wk).
        blocks: the candidates. None: those of the paper that have an output under this kernel. ``[kernel]`` is
            pixel-exact: 1x1 tiles, whose objective is the number of active pixels and the least of all.

    Raises:
        ValueError: a block in ``blocks`` has no output under this kernel, ``blocks`` is empty, or no block of the paper
            reaches the kernel's size.
    """
    if blocks is None:
        blocks = [b for b in PAPER_BLOCKS if b[0] >= kernel[0] and b[1] >= kernel[1]]
    if not blocks:
        raise ValueError(f"no block to choose from for a kernel of {_x(kernel)}; give blocks of at least its size")
    tiles = [output_tile(block, kernel) for block in blocks]
    # One host sync for all candidates together, should the mask be on an accelerator.
    counts = torch.stack([active_tiles(mask, tile).sum() for tile in tiles]).tolist()
    candidates = tuple(
        BlockCandidate(block, tile, count, tile[0] * tile[1] * count)
        for block, tile, count in zip(blocks, tiles, counts, strict=True)
    )
    chosen = min(candidates, key=lambda c: (c.objective, c.loaded, c.block))
    return BlockChoice(kernel, chosen, candidates)


def _x(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
