"""Interleaved timing: alternatives take turns in one loop, so that a slow spell of the machine meets all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of some times, in milliseconds."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Spread:
        p10, median, p90 = np.percentile(milliseconds, (10, 50, 90))
        return cls(float(median), float(p10), float(p90))


def interleaved(
    runs: Mapping[Key, Callable[[], object]], *, repeats: int, warmup: int, device: torch.device, label: str
) -> dict[Key, list[float]]:
    """Milliseconds of each run, ``repeats`` times, after ``warmup`` rounds that are not kept.

    On CUDA the time is that between two events around the run on an idle device, so it has the launches in it.
    """
    times: dict[Key, list[float]] = {key: [] for key in runs}
    with tqdm(total=(warmup + repeats) * len(runs), desc=label, leave=False) as bar:
        for round_number in range(warmup + repeats):
            for key, run in runs.items():
                milliseconds = _milliseconds(run, device)
                if round_number >= warmup:
                    times[key].append(milliseconds)
                bar.update()
    return times


def _milliseconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    with torch.cuda.device(device):
        torch.cuda.synchronize()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after))
