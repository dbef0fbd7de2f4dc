"""Rows in a few bits a value, as a base keeps them: what a row's bytes are, and how they are made and read.

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
from torch.nn import functional as F

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
    def nbytes(self) -> int:
        """Bytes of a row."""
        word = max(_WORD, self.dtype.itemsize)
        return -(-(self.header + -(-self.width * self.bits // 8)) // word) * word

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


def mean_of_tiles(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows ``[B*H*W, *channels]`` of a map of ``size`` (H, W) -> the mean of each tile, ``[tiles, *channels]``.

    Tiles at the lower and right edge of a map of odd size have fewer pixels.
    """
    pixels = rows.reshape(-1, *size, rows[0].numel()).permute(0, 3, 1, 2)
    means = F.avg_pool2d(pixels, TILE, ceil_mode=True, count_include_pad=False)
    return means.permute(0, 2, 3, 1).reshape(-1, *rows.shape[1:])


def pack_rows_reference(rows: Tensor, bits: int) -> Tensor:
    """Rows ``[R, *channels]`` in ``bits`` a value, uint8 ``[R, RowFormat.nbytes]``.

    A group with a value that is not finite comes back as NaN.
    """
    form = RowFormat(tuple(rows.shape[1:]), rows.dtype, bits)
    count, each = rows.shape[0], 8 // bits
    values = rows.reshape(count, form.width)
    padding = form.groups * form.group - form.width
    last = values[:, -1:].expand(count, padding)  # changes neither end of the last group's range
    grouped = torch.cat([values, last], 1).view(count, form.groups, form.group)
    exact = torch.promote_types(rows.dtype, torch.float32)
    low, high = (end.to(exact) for end in (grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)))
    step = ((high - low) / (2**bits - 1)).to(rows.dtype)
    spread = step.to(exact)
    codes = torch.floor((grouped.to(exact) - low) / torch.where(spread == 0, 1, spread) + 0.5)
    codes = codes.nan_to_num(0.0).clamp(0, 2**bits - 1).to(torch.uint8).unflatten(-1, (-1, each)).flatten(1, 2)
    packed = rows.new_zeros(count, form.nbytes, dtype=torch.uint8)
    ends = torch.cat([low.to(rows.dtype), step], -1).flatten(1)
    packed[:, : form.header] = ends.contiguous().view(torch.uint8)
    taken = -(-form.width // each)
    shifts = torch.arange(each, dtype=torch.uint8, device=rows.device) * bits
    packed[:, form.header : form.header + taken] = (codes << shifts).sum(-1, dtype=torch.uint8)[:, :taken]
    return packed


def unpack_rows_reference(packed: Tensor, form: RowFormat) -> Tensor:
    """The rows ``[R, *channels]`` of what :func:`pack_rows_reference` made of such rows."""
    count, each = packed.shape[0], 8 // form.bits
    ends = packed[:, : form.header].contiguous().view(form.dtype).view(count, form.groups, 2)
    shifts = torch.arange(each, dtype=torch.uint8, device=packed.device) * form.bits
    codes = (packed[:, form.header :, None] >> shifts & 2**form.bits - 1).flatten(1)[:, : form.width]
    group = torch.arange(form.width, device=packed.device) // form.group
    exact = torch.promote_types(form.dtype, torch.float32)
    low, step = ends.to(exact).index_select(1, group).unbind(-1)
    return torch.addcmul(low, codes.to(exact), step).to(form.dtype).view(count, *form.channels)
