"""Tile shapes of the product of rows: the best of a sweep over sizes, run once offline on one GPU.

An autotuner at run time would measure anew at every count of rows, that is at every mask, and a cost model fitted to
the same sweep chose tiles that took 8 % longer than the best. So the choice is the best tile of the nearest size that
was measured: ``row_product_tiles.json``, in the form that ``fisedit-compile bench kernels --sweep --json`` writes.
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

_MEASURED = Path(__file__).with_name("row_product_tiles.json")

# Microseconds of an epilogue as a kernel of its own, bytes a microsecond, and values of it that move for each output.
_FINISH = 1.9
_FINISH_BYTES = 5e6
_FINISH_VALUES = 3


@dataclass(frozen=True)
class Tile:
    """A program's share and how it runs.

    Attributes:
        rows, filters: of the output that a program computes; rows are a power of two, or the sum of two.
        channels: of one tap in a step of its loop.
        warps, stages: of a program, and of its software pipeline.
        splits: programs that share the loop of one output tile.
        second_kernel: whether a kernel of its own adds their partial sums, not the program that comes last.
        across: whether filters run down the matrix unit's product, where it takes 64 at once, and rows across, where it
            takes any multiple of 8: for few rows.
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
        """The smaller part of rows that are the sum of two powers of two; 0 where they are one."""
        return self.rows - largest_power_of_two(self.rows)


@dataclass(frozen=True)
class Library:
    """Instead of a tile: cuBLAS multiplies, and a kernel behind it does the epilogue."""


@lru_cache(maxsize=4096)
def choose_tile(
    rows: int,
    taps: int,
    channels: int,
    filters: int,
    dtype: torch.dtype,
    *,
    side_channels: int = 0,
    geglu: bool = False,
    linear: bool = False,
    plain: bool = False,
    apart: bool = False,
) -> Tile | Library:
    """A tile for ``[rows, taps * channels] x [taps * channels, filters]``, or for a linear layer cuBLAS.

    Args:
        side_channels: how much deeper the product is, by rows beside those of the taps.
        geglu: the product is twice as wide as its output.
        linear: there is no neighbour table, so that cuBLAS could do it; in 16 bits alone, where its precision is the
            kernel's.
        plain: there is no epilogue but a bias, which cuBLAS adds itself.
        apart: the epilogue is a kernel of its own, whatever multiplies.
    """
    depth = taps * channels + side_channels
    sizes = _measured()
    nearest = min(
        (size for size in sizes if size[2] == geglu),
        key=lambda size: _ratio(depth, size[0]) + _ratio(filters, size[1]),
    )
    entry = min(sizes[nearest], key=lambda entry: _ratio(max(rows, 1), entry.rows))
    finish = 0.0 if plain else _FINISH + entry.rows * nearest[1] * _FINISH_VALUES * 2 / _FINISH_BYTES
    ours = entry.us + (finish if apart and not entry.tile.second_kernel else 0.0)
    if linear and dtype.itemsize == 2 and entry.library_us + finish < ours:
        return Library()
    # An output several times as large as what was measured has as many programs with fewer splits.
    larger = max(1, rows * filters // (entry.rows * nearest[1]))
    tile = replace(entry.tile, splits=max(1, entry.tile.splits // larger))
    return _fitted(tile, rows, depth // channels, channels, filters, dtype, geglu)


def _fitted(tile: Tile, rows: int, taps: int, channels: int, filters: int, dtype: torch.dtype, geglu: bool) -> Tile:
    """The tile no larger than the product (a matrix unit's 16 at least), and in fp32 than the registers."""
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
    """Whether the software pipeline fits the shared memory of a multiprocessor, for 2-byte values."""
    return stages * (height + width * (2 if geglu else 1)) * step * 2 <= 227 * 1024


@dataclass(frozen=True)
class _Measured:
    """The best tile for a number of rows, and microseconds: with a bias and a residual, and of cuBLAS with a bias."""

    rows: int
    tile: Tile
    us: float
    library_us: float


@cache
def _measured() -> dict[tuple[int, int, bool], list[_Measured]]:
    """By (depth, filters, geglu)."""
    sizes: dict[tuple[int, int, bool], list[_Measured]] = defaultdict(list)
    for entry in json.loads(_MEASURED.read_text())["best"]:
        values: dict[str, Any] = dict(entry)
        size = (values.pop("depth"), values.pop("filters_out"), values.pop("geglu"))
        rows, us, library = (values.pop(name) for name in ("rows_out", "us", "library_us"))
        sizes[size].append(_Measured(rows, Tile(**values), us, library))
    return dict(sizes)


def _ratio(a: int, b: int) -> float:
    return abs(math.log(a / b))


def largest_power_of_two(n: int) -> int:
    """Not over ``n``."""
    return 1 << (n.bit_length() - 1)


def _power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())
