"""Tile shapes of the convolution over rows: a cost model picks one by size, without running anything.

An autotuner would measure anew at every count of rows, that is at every mask. The constants below are what a sweep
(``fisedit-compile bench kernels --sweep``) is fitted to; they start from the peak rates of an H200.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Tile:
    """A program's share and how it runs.

    Attributes:
        rows, filters: of the output that a program computes.
        channels: of one tap in a step of its loop.
        warps, stages: of a program, and of its software pipeline.
        splits: programs that share the loop of one output tile; their partial sums are added by a second kernel.
    """

    rows: int
    filters: int
    channels: int
    warps: int
    stages: int
    splits: int = 1


# Fitted to the 740 timings of benchmarks/results/kernels_sweep_h200.json (bf16): the choice is within 1.5 % of the
# best tile on average and within 17 % at worst.
# (tile for 2-byte values, share of the tensor cores' peak in a full loop, programs that fit a multiprocessor)
_TILES = (
    (Tile(128, 256, 64, 8, 3), 0.81, 1),
    (Tile(128, 128, 64, 8, 3), 0.55, 2),
    (Tile(128, 64, 64, 4, 4), 0.58, 2),
    (Tile(64, 128, 64, 4, 4), 0.58, 2),
    (Tile(64, 64, 64, 4, 4), 0.37, 3),
    (Tile(32, 128, 64, 4, 4), 0.37, 2),
    (Tile(32, 64, 64, 4, 5), 0.20, 3),
    (Tile(16, 128, 64, 4, 4), 0.21, 3),
    (Tile(16, 64, 64, 4, 5), 0.20, 4),
)
_SPLITS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)
_LEAST_STEPS = 4  # of a program's loop: fewer never leave its prologue

# Microseconds, and floating-point operations a microsecond and multiprocessor.
_PEAK = 790e12 / 132 / 1e6
_START = 3.76  # launch, first loads and last stores of one wave of programs
_STEP = 0.39  # a step of the loop that waits for its loads and its product
_SECOND_KERNEL = 1.96
_WORKSPACE_BYTES = 4.9e6  # a microsecond: partial sums live in L2


def candidates(channels: int, filters: int, dtype: torch.dtype) -> list[Tile]:
    """All tiles that fit a convolution's width, without splits."""
    return [tile for tile, _, _ in _fitting(channels, filters, dtype)]


@lru_cache(maxsize=4096)
def choose_tile(rows: int, taps: int, channels: int, filters: int, dtype: torch.dtype, multiprocessors: int) -> Tile:
    """The tile with the least predicted time for ``[rows, taps * channels] x [taps * channels, filters]``."""
    best, least = None, float("inf")
    for tile, efficiency, resident in _fitting(channels, filters, dtype):
        tiles = _ceil(rows, tile.rows) * _ceil(filters, tile.filters)
        steps = taps * _ceil(channels, tile.channels)
        rate = _PEAK * efficiency * (1.0 if dtype.itemsize == 2 else 0.3)
        product = 2 * tile.rows * tile.filters * tile.channels / rate  # microseconds of a multiprocessor
        for splits in usable_splits(steps):
            programs = _ceil(tiles * splits, multiprocessors)  # on the busiest multiprocessor
            waves = _ceil(programs, resident)
            time = waves * _START + _ceil(steps, splits) * max(programs * product, waves * _STEP)
            if splits > 1:
                time += _SECOND_KERNEL + 2 * splits * rows * filters * 4 / _WORKSPACE_BYTES
            if time < least:
                best, least = replace(tile, splits=splits), time
    assert best is not None
    return best


def usable_splits(steps: int) -> list[int]:
    """Numbers of splits that leave every program some steps of the loop."""
    return [splits for splits in _SPLITS if splits == 1 or steps >= splits * _LEAST_STEPS]


def _fitting(channels: int, filters: int, dtype: torch.dtype) -> list[tuple[Tile, float, int]]:
    """``_TILES`` as wide as the convolution (a matrix unit's 16 at least); 4-byte values in steps of half the size."""
    widest_step = 64 if dtype.itemsize == 2 else 32
    step = min(widest_step, _power_of_two(channels))
    width = _power_of_two(filters)
    found: dict[Tile, tuple[Tile, float, int]] = {}
    for tile, efficiency, resident in _TILES:
        if tile.filters > 2 * width and tile.filters > 64:
            continue
        if dtype.itemsize == 4 and tile.rows * tile.filters > 64 * 128:
            continue  # without tensor cores (ieee) the product lives in registers
        fitted = replace(tile, filters=min(tile.filters, width), channels=step)
        share = fitted.filters / tile.filters
        found.setdefault(fitted, (fitted, efficiency * share, resident))
    return list(found.values())


def _power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _ceil(n: int, by: int) -> int:
    return -(-n // by)
