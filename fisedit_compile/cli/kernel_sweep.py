"""``bench kernels --sweep``: the tiles of the convolution at each shape, to fit its size heuristic to."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import triton
from torch import Tensor

from fisedit_compile.cli.kernel_cases import CONVOLUTIONS, convolution_inputs, microseconds, square
from fisedit_compile.kernels.conv2d_rows_tiles import Tile, candidates, choose_tile, usable_splits
from fisedit_compile.kernels.conv2d_rows_triton import conv2d_rows_triton
from fisedit_compile.kernels.triton_launch import multiprocessors

#: Seconds after which variants are no longer started. The tiles as they are take about a minute before.
_BUDGET = 120.0
_TAPS = 9


def sweep(edit_sizes: Sequence[float], device: torch.device, dtype: torch.dtype) -> tuple[list[dict[str, Any]], int]:
    """Time tiles and splits at all shapes, then other stages, warps and steps of the best one at each shape.

    Returns:
        For each shape its sizes, the best tile and the chosen one with their microseconds, and ``times``: all that was
        timed. And the number of shapes whose variants were left out for want of time.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    rows = []
    for side, channels, filters in CONVOLUTIONS:
        for edit_size in edit_sizes:
            inputs = convolution_inputs(square(edit_size, side, device), side, channels, filters, dtype)
            count = inputs[-1].shape[0]
            chosen = choose_tile(count, _TAPS, channels, filters, dtype, multiprocessors(device))
            tried = dict.fromkeys([chosen, *_first_tiles(count, channels, filters, dtype, device)])
            times = {tile: _time(inputs, tile) for tile in tried}
            rows.append((edit_size, side, inputs, chosen, times))
    skipped = 0
    for _, _, inputs, _, times in rows:
        if time.perf_counter() - start > _BUDGET:
            skipped += 1
            continue
        best = min(times, key=lambda tile: times[tile])
        times.update({tile: _time(inputs, tile) for tile in _variants(best, dtype) if tile not in times})
    return [_report(*row) for row in rows], skipped


def _first_tiles(count: int, channels: int, filters: int, dtype: torch.dtype, device: torch.device) -> list[Tile]:
    """Every tile, with the splits that give between half and three programs to a multiprocessor, and with none."""
    found = []
    for tile in candidates(channels, filters, dtype):
        tiles = triton.cdiv(count, tile.rows) * triton.cdiv(filters, tile.filters)
        if count <= tile.rows // 4 and tile.rows > 16:
            continue  # mostly padding: a smaller tile is among the candidates
        share = tiles / multiprocessors(device)
        steps = _TAPS * triton.cdiv(channels, tile.channels)
        found += [
            replace(tile, splits=splits)
            for splits in usable_splits(steps)
            if 0.5 <= share * splits <= 3 or (splits == 1 and share >= 0.25)
        ]
    return found


def _variants(best: Tile, dtype: torch.dtype) -> list[Tile]:
    """The best tile with other stages, warps or steps."""
    found = [replace(best, stages=stages) for stages in (3, 4, 5)]
    found.append(replace(best, warps=12 - best.warps))  # 4 for 8 and 8 for 4
    found.append(replace(best, channels=max(16, best.channels // 2)))
    fits = 220 * 1024  # bytes of shared memory
    return [
        tile
        for tile in found
        if tile.stages * (tile.rows + tile.filters) * tile.channels * dtype.itemsize <= fits
        and (tile.warps == 8 or tile.rows * tile.filters <= 128 * 128)  # the accumulators stay in registers
    ]


def _time(inputs: tuple[Tensor, ...], tile: Tile) -> float:
    rows, halo, weight, bias, table = inputs
    return microseconds(lambda: conv2d_rows_triton(rows, halo, weight, bias, table, tile), warmup=1, rep=8)


def _report(
    edit_size: float, side: int, inputs: tuple[Tensor, ...], chosen: Tile, times: dict[Tile, float]
) -> dict[str, Any]:
    rows, _, weight, _, table = inputs
    best = min(times, key=lambda tile: times[tile])
    return {
        "side": side,
        "edit_size": edit_size,
        "rows": table.shape[0],
        "channels": rows.shape[1],
        "filters": weight.shape[0],
        "best": _name(best),
        "best_us": times[best],
        "chosen": _name(chosen),
        "chosen_us": times[chosen],
        "times": [{**asdict(tile), "us": us} for tile, us in times.items()],
    }


def _name(tile: Tile) -> str:
    return f"{tile.rows}x{tile.filters}x{tile.channels} /{tile.splits} w{tile.warps} s{tile.stages}"
