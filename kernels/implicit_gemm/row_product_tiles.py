"""Tile shapes of the product of rows: the best of a sweep over sizes, run once offline on one GPU.

The best tile depends on the count of rows, which every mask has another of: an autotuner would measure at run time,
mask after mask. A cost model fitted to the same sweep chose tiles that took 8 % longer than the best. So a product
takes the best tile of the nearest size that was measured. ``row_product_tiles.json`` has these, in the form that
``fisedit-compile bench kernels --sweep --json`` writes.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

_TILES_FILE = Path(__file__).with_name("row_product_tiles.json")

# The time of an epilogue as a kernel of its own: microseconds of its launch, bytes that it moves in a microsecond, and
# values that it reads and writes for each value of the result.
_FINISH_US = 1.9
_FINISH_BYTES_A_US = 5e6
_FINISH_MOVES = 3


@dataclass(frozen=True)
class Tile:
    """What one program of the kernel computes of a product, and how it runs.

    Attributes:
        rows, filters: the part of the output that a program computes. ``rows`` is a power of two, or the sum of two.
        channels: how many channels of one tap a step of the program's loop multiplies.
        warps: of a program.
        stages: of its software pipeline: steps whose operands are in flight at once.
        splits: how many programs share the loop over the depth of one tile.
        second_kernel: a second kernel adds the partial sums of the splits, in place of the program that comes last.
        across: filters run down the matrix unit's product, where it takes 64 at once, and rows run across it, where it
            takes any multiple of 8. That leaves less of the unit idle where a tile has few rows.
    """

    rows: int
    filters: int
    channels: int
    warps: int
    stages: int
    splits: int = 1
    second_kernel: bool = False
    across: bool = False

    @property
    def more_rows(self) -> int:
        """The smaller of the two powers of two that ``rows`` is the sum of; 0 where it is one power of two."""
        return self.rows - largest_power_of_two(self.rows)


@dataclass(frozen=True)
class Library:
    """Stands in place of a tile where cuBLAS multiplies, and a kernel behind it does the epilogue."""


@lru_cache(maxsize=4096)
def choose_tile(
    rows: int,
    taps: int,
    channels: int,
    filters: int,
    dtype: torch.dtype,
    *,
    shortcut_channels: int = 0,
    geglu: bool = False,
    linear: bool = False,
    plain: bool = False,
    second_kernel: bool = False,
) -> Tile | Library:
    """A tile for ``[rows, taps * channels] x [taps * channels, filters]``, or for a linear layer cuBLAS.

    Args:
        rows: of the output, padding included.
        taps: pixels that an output row reads; 1 for a linear layer.
        channels: of an input row.
        filters: columns of the output.
        dtype: of the rows and the weight.
        shortcut_channels: depth that a convolution's shortcut adds to the product.
        geglu: the product is twice as wide as its output.
        linear: there is no neighbour table, so that cuBLAS may take it. It does in 16 bits alone, where its precision
            is that of the kernel.
        plain: nothing but a bias follows the product, which cuBLAS adds itself.
        second_kernel: a kernel of its own does the epilogue, whatever multiplies.
    """
    depth = taps * channels + shortcut_channels
    sizes = _best_tiles()
    nearest = min(
        (size for size in sizes if size[2] == geglu),
        key=lambda size: _ratio(depth, size[0]) + _ratio(filters, size[1]),
    )
    entry = min(sizes[nearest], key=lambda entry: _ratio(max(rows, 1), entry.rows))
    finish = 0.0 if plain else _FINISH_US + entry.rows * nearest[1] * _FINISH_MOVES * 2 / _FINISH_BYTES_A_US
    ours = entry.us + (finish if second_kernel and not entry.tile.second_kernel else 0.0)
    if linear and dtype.itemsize == 2 and entry.library_us + finish < ours:
        return Library()
    # Where the output is several times as large as the one that was measured, fewer splits give as many programs.
    larger = max(1, rows * filters // (entry.rows * nearest[1]))
    tile = replace(entry.tile, splits=max(1, entry.tile.splits // larger))
    return fit_tile(tile, rows, depth // channels, channels, filters, dtype, geglu)


def fit_tile(tile: Tile, rows: int, taps: int, channels: int, filters: int, dtype: torch.dtype, geglu: bool) -> Tile:
    """A tile cut to what the product and the GPU allow.

    No side is longer than the product's, but for the matrix unit's least of 16. In fp32 the tile fits the registers, in
    16 bits its pipeline fits the shared memory.
    """
    height = min(tile.rows, _power_of_two(rows))
    if dtype.itemsize == 4 or geglu:
        height = largest_power_of_two(height)
    width = min(tile.filters, _power_of_two(filters))
    step, stages = min(tile.channels, _power_of_two(channels)), tile.stages
    if dtype.itemsize == 4:
        # Values of twice the size, and without tensor cores (ieee) the operands of a product live in registers.
        step, stages = min(step, 32), min(stages, 3)
        while height * width * (2 if geglu else 1) > 64 * 128:
            height, width = (height // 2, width) if height >= width else (height, width // 2)
    elif not _fits(height, width, step, stages, geglu):
        stages = 2
    steps = taps * -(-channels // step)
    return replace(
        tile, rows=height, filters=width, channels=step, stages=stages, splits=max(1, min(tile.splits, steps // 2))
    )


def _fits(height: int, width: int, step: int, stages: int, geglu: bool) -> bool:
    """Whether a software pipeline of 2-byte values fits the shared memory of a multiprocessor."""
    return stages * (height + width * (2 if geglu else 1)) * step * 2 <= 227 * 1024


@dataclass(frozen=True)
class _BestTile:
    """The fastest tile that the sweep found for a number of rows.

    Attributes:
        rows: of the output.
        tile: the fastest.
        us: its microseconds, with a bias and a residual.
        library_us: microseconds of cuBLAS, with a bias.
    """

    rows: int
    tile: Tile
    us: float
    library_us: float


@cache
def _best_tiles() -> dict[tuple[int, int, bool], list[_BestTile]]:
    """What the sweep found, by (depth, filters, geglu) of the product."""
    sizes: dict[tuple[int, int, bool], list[_BestTile]] = defaultdict(list)
    for entry in json.loads(_TILES_FILE.read_text())["best"]:
        values: dict[str, Any] = dict(entry)
        size = (values.pop("depth"), values.pop("filters_out"), values.pop("geglu"))
        rows, us, library = (values.pop(name) for name in ("rows_out", "us", "library_us"))
        sizes[size].append(_BestTile(rows, Tile(**values), us, library))
    return dict(sizes)


def _ratio(a: int, b: int) -> float:
    """How far apart two sizes are: the absolute logarithm of their ratio."""
    return abs(math.log(a / b))


def largest_power_of_two(n: int) -> int:
    """The largest power of two that is at most ``n``, which is at least 1."""
    return 1 << (n.bit_length() - 1)


def _power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n``, and a matrix unit's 16."""
    return max(16, 1 << (n - 1).bit_length())
