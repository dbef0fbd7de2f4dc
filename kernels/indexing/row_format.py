"""Rows in a few bits a value, as a base keeps them: what the bytes of a row are.

Neighbouring channels of a row form a group, which has a lowest value and a step. Each value is the number of steps
above the lowest, rounded: with 4 bits it is off by at most a thirtieth of the group's range. A row is

    lowest and step of each group, in the dtype of the values | codes, low bits first, each row a whole number of words

so that any row can be read alone. Keys and values, which are read whole, may be kept by the tile: one row, their mean,
stands for two by two pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: At most as many channels form a group. The width of a group changed no picture (docs/measurements/cache.md).
_WIDEST_GROUP = 128

#: Channels that a thread of a kernel reads at once: no group ends between them.
EIGHT = 8

#: A row's bytes are a multiple of it, and of the bytes of a value.
_WORD = 4

#: Pixels along a side of a tile.
TILE = 2


@dataclass(frozen=True)
class RowFormat:
    """How rows of ``channels`` lie in memory.

    Attributes:
        channels: the shape of a row.
        dtype: of its values.
        bits: of each code, 2 or 4.
        size: height and width of the map in pixels, where a row stands for a tile of them; None where for a pixel.
    """

    channels: tuple[int, ...]
    dtype: torch.dtype
    bits: int
    size: tuple[int, int] | None = None

    @property
    def width(self) -> int:
        """Values of a row."""
        return math.prod(self.channels)

    @property
    def group(self) -> int:
        """Channels of a group; the last of a row may have fewer. An attention head is one group, where that fits."""
        last = self.channels[-1]
        return last if last <= _WIDEST_GROUP and last % EIGHT == 0 else _WIDEST_GROUP

    @property
    def groups(self) -> int:
        return -(-self.width // self.group)

    @property
    def header(self) -> int:
        """Bytes of a row ahead of its codes."""
        return 2 * self.groups * self.dtype.itemsize

    @property
    def used(self) -> int:
        """Bytes of a row that say something; up to a whole word the others are 0."""
        return self.header + -(-self.width * self.bits // 8)

    @property
    def nbytes(self) -> int:
        """Bytes of a row."""
        word = max(_WORD, self.dtype.itemsize)
        return -(-self.used // word) * word

    def rows_of(self, pixels: int) -> int:
        """How many rows are kept of a map of so many pixels, of all samples together."""
        if self.size is None:
            return pixels
        height, width = self.size
        return pixels // (height * width) * -(-height // TILE) * -(-width // TILE)

    def row_of_each_pixel(self, pixels: int) -> Tensor | None:
        """The row that stands for each pixel, int64 ``[pixels]``; None where each has its own."""
        if self.size is None:
            return None
        height, width = self.size
        rows = torch.arange(self.rows_of(pixels)).view(-1, -(-height // TILE), -(-width // TILE))
        every = rows.repeat_interleave(TILE, 1).repeat_interleave(TILE, 2)
        return every[:, :height, :width].flatten()
