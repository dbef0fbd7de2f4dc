"""Adaptive pixel-wise sparse convolution (APSC): the block that covers a mask at the least cost (paper, A.1).

A convolution of kernel ``(hk, wk)`` is computed in input blocks of ``(h, w)`` pixels, each giving an output tile of
``(h - hk + 1, w - wk + 1)``. Tiles lie side by side from the top left corner of the map, and a tile is computed if it
holds an active pixel. The block chosen minimises ``f(h, w) = (h - hk + 1) (w - wk + 1) N(h, w, mask)``, the number
of output pixels that are computed; N is the number of computed tiles.

As printed, f is zero for h = 2 under a 3x3 kernel, which gives no output at all: those sizes are no candidates here.
The tiles that remain for 3x3 have sides 2, 6, 14 and 30. All grids start at the corner and 2 divides the others, so a
tile of any size is a union of 2x2 tiles and no block has a lesser objective than 4x4: larger ones can only tie.

Fewer output pixels are not always less time. :func:`choose_rows` therefore minimises a cost in microseconds, and has
two more candidates: the 1x1 tile, which is the mask itself, and one tile as large as the map, with which layers are
dense.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile.ir.layout import Size, size_text

#: The paper's candidates (h, w): both sides from {2, 4, 8, 16, 32}.
PAPER_BLOCKS: tuple[Size, ...] = tuple((h, w) for h in (2, 4, 8, 16, 32) for w in (2, 4, 8, 16, 32))


@dataclass(frozen=True)
class BlockCandidate:
    """One block size and what it costs for a mask, all samples together.

    Attributes:
        block: (h, w) of the input block, in pixels.
        tile: (h - hk + 1, w - wk + 1), the output pixels that a block gives.
        tiles: N(h, w, mask), the number of tiles with an active pixel.
        objective: f(h, w), the output pixels computed, counting those of a tile that lie beyond the map's edge.
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
        lines = [f"kernel {size_text(self.kernel)}: {'block':>7} {'tile':>7} {'tiles':>8} {'objective':>10}"]
        for c in self.candidates:
            mark = "  <- chosen" if c is self.chosen else ""
            lines.append(
                f"            {size_text(c.block):>7} {size_text(c.tile):>7} {c.tiles:>8} {c.objective:>10}{mark}"
            )
        return "\n".join(lines)


def output_tile(block: Size, kernel: Size) -> Size:
    """The output tile ``(h - hk + 1, w - wk + 1)`` of a block.

    Raises:
        ValueError: the block is smaller than the kernel, so that it has no output.
    """
    tile = block[0] - kernel[0] + 1, block[1] - kernel[1] + 1
    if min(kernel) < 1 or min(tile) < 1:
        raise ValueError(
            f"a block of {size_text(block)} under a kernel of {size_text(kernel)} has no output "
            f"(tile {size_text(tile)}); give a block of at least the kernel's size, or {size_text(kernel)} itself for "
            "pixel-exact 1x1 tiles"
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
        blocks: the candidates; None takes those of the paper's that have an output under this kernel. With
            ``[kernel]`` the choice is pixel-exact: its tiles are 1x1, and its objective, the number of active pixels,
            is the least that any block has.

    Raises:
        ValueError: a block in ``blocks`` has no output under this kernel, ``blocks`` is empty, or no block of the paper
            reaches the kernel's size.
    """
    if blocks is None:
        blocks = [b for b in PAPER_BLOCKS if b[0] >= kernel[0] and b[1] >= kernel[1]]
    if not blocks:
        raise ValueError(
            f"no block to choose from for a kernel of {size_text(kernel)}; give blocks of at least its size"
        )
    tiles = [output_tile(block, kernel) for block in blocks]
    # One host sync for all candidates together, should the mask be on an accelerator.
    counts = torch.stack([active_tiles(mask, tile).sum() for tile in tiles]).tolist()
    candidates = tuple(
        BlockCandidate(block, tile, count, tile[0] * tile[1] * count)
        for block, tile, count in zip(blocks, tiles, counts, strict=True)
    )
    chosen = min(candidates, key=lambda c: (c.objective, c.loaded, c.block))
    return BlockChoice(kernel, chosen, candidates)


#: Predicts the microseconds of the layers at one resolution from (rows, halo rows), all samples together.
RowCost = Callable[[int, int], float]

#: The same for every resolution, from (resolution, rows, halo rows).
CostModel = Callable[[Size, int, int], float]


@dataclass(frozen=True)
class RowCandidate:
    """One way to cover a mask, and what it is predicted to cost.

    Attributes:
        kind: ``pixel`` computes the mask itself, ``tiles`` the tiles of one of the paper's blocks, and ``whole`` every
            pixel of each sample that has an active one.
        tile: (h, w) of the output tile; with ``whole`` it is the size of the map.
        rows: output pixels computed, all samples together. Unlike in the paper's objective, the part of a tile beyond
            the map's edge does not count.
        halo: pixels that are no rows but that the kernel reads, all samples together.
        microseconds: the predicted cost.
    """

    kind: Literal["pixel", "tiles", "whole"]
    tile: Size
    rows: int
    halo: int
    microseconds: float

    @property
    def name(self) -> str:
        """The candidate as reports print it."""
        return self.kind if self.kind != "tiles" else f"tiles {size_text(self.tile)}"


@dataclass(frozen=True)
class RowChoice:
    """The candidate with the least predicted cost, and every candidate that it was chosen from."""

    chosen: RowCandidate
    candidates: tuple[RowCandidate, ...]

    def of_tile(self, tile: Size) -> RowCandidate:
        """The candidate with this tile; (1, 1) is pixel-exact, and a tile that is none of them means the whole map."""
        return next((each for each in self.candidates if each.tile == tile), self.candidates[-1])

    def __str__(self) -> str:
        lines = [f"{'tile':>12} {'rows':>8} {'halo':>8} {'us':>10}"]
        for c in self.candidates:
            mark = "  <- chosen" if c is self.chosen else ""
            lines.append(f"{c.name:>12} {c.rows:>8} {c.halo:>8} {c.microseconds:>10.1f}{mark}")
        return "\n".join(lines)


def choose_rows(mask: Tensor, cost: RowCost, kernel: Size = (3, 3), *, copies: int = 1) -> RowChoice:
    """The rows with the least predicted cost, for all samples of a mask together.

    Candidates are the 1x1 tile, the tiles of the paper's blocks that have an output under the kernel and do not cover
    the map, and the whole map. Between equal costs the candidate with fewer rows wins, then the one with fewer halo
    rows, then the smaller tile.

    Args:
        mask: active output pixels, bool ``[n, h, w]``.
        cost: predicted microseconds of (rows, halo rows).
        kernel: (hk, wk) of the convolutions, for the blocks' tiles and the halo.
        copies: how often the U-Net's batch repeats the mask's samples. All rows and halo rows, those that ``cost`` is
            given among them, are counted that many times.

    Raises:
        ValueError: a cost that is negative or no number.
    """
    height, width = mask.shape[1:]
    tiles: dict[Size, Literal["pixel", "tiles", "whole"]] = {(1, 1): "pixel"}
    for block in PAPER_BLOCKS:
        if block[0] >= kernel[0] and block[1] >= kernel[1]:
            tile = output_tile(block, kernel)
            if tile[0] < height or tile[1] < width:
                tiles.setdefault(tile, "tiles")
    tiles.setdefault((height, width), "whole")
    covered = [expand_to_tiles(mask, tile) for tile in tiles]
    # One host sync for all candidates together, should the mask be on an accelerator.
    counts = torch.stack([torch.stack((rows.sum(), _halo(rows, kernel).sum())) for rows in covered]).tolist()
    candidates = []
    for (tile, kind), (rows, halo) in zip(tiles.items(), counts, strict=True):
        microseconds = float(cost(copies * rows, copies * halo))
        if not 0 <= microseconds < math.inf:
            raise ValueError(f"a cost of {microseconds} for {copies * rows} rows: give microseconds, at least 0")
        candidates.append(RowCandidate(kind, tile, copies * rows, copies * halo, microseconds))
    chosen = min(candidates, key=lambda c: (c.microseconds, c.rows, c.halo, c.tile[0] * c.tile[1], c.tile))
    return RowChoice(chosen, tuple(candidates))


def _halo(rows: Tensor, kernel: Size) -> Tensor:
    """bool ``[n, h, w]``: what a kernel reads around bool ``rows [n, h, w]``; its even sides count as one more."""
    sides = (kernel[0] // 2 * 2 + 1, kernel[1] // 2 * 2 + 1)
    read = F.max_pool2d(rows[:, None].float(), sides, stride=1, padding=(sides[0] // 2, sides[1] // 2))
    return (read[:, 0] > 0) & ~rows
