"""Interleaved timing: alternatives take turns in one loop, so that a slow spell of the machine meets all of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

Key = TypeVar("Key", bound=Hashable)
Run = Callable[[], object]

#: A sample on CUDA is the mean of as many back-to-back calls as take this long, at least two.
_SAMPLE_MS = 10.0
_FEWEST_CALLS, _MOST_CALLS = 2, 64

#: Calls on an idle device, at most: latency and host time spread little.
_MOST_SINGLES = 10


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


@dataclass
class Times:
    """Milliseconds of one run, each a list of samples.

    Attributes:
        steady: a call among others of its kind, as the steps of a pipeline follow one another.
        latency: one call on an idle device, from its launch to its end; on the CPU the same as ``steady``.
        host: how long that call kept the host busy; empty on the CPU.
        calls: of a sample of ``steady``.
    """

    steady: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    calls: int = 1

    @property
    def host_ms(self) -> float | None:
        """The median, None on the CPU."""
        return median(self.host) if self.host else None


def interleaved(
    runs: Mapping[Key, Run],
    *,
    repeats: int | Mapping[Key, int],
    warmup: int,
    device: torch.device,
    label: str,
) -> dict[Key, Times]:
    """Time each run ``repeats`` times, in rounds, after ``warmup`` rounds that are not kept.

    On the CPU a sample is one call. On CUDA it is the time between two events around a few back-to-back calls, divided
    by their number, with one more call before the first event: the device is never idle in it unless the host cannot
    keep up. A few rounds of single calls on an idle device follow.

    Args:
        runs: what to time.
        repeats: of all, or of each; runs with fewer than the most take part in evenly spaced rounds.
        warmup: rounds, at least one.
        device: that the runs use.
        label: of the progress bar.
    """
    wanted = dict.fromkeys(runs, repeats) if isinstance(repeats, int) else dict(repeats)
    times = {key: Times() for key in runs}
    most = max(wanted.values())
    singles = {key: min(_MOST_SINGLES, wanted[key]) if device.type == "cuda" else 0 for key in runs}
    total = warmup * len(runs) + sum(wanted.values()) + sum(singles.values())
    with tqdm(total=total, desc=label, leave=False, disable=None) as bar:
        fastest = dict.fromkeys(runs, math.inf)
        for _ in range(warmup):
            for key, run in runs.items():
                fastest[key] = min(fastest[key], _single(run, device)[0])
                bar.update()
        for key, each in times.items():
            each.calls = _calls(fastest[key]) if device.type == "cuda" else 1
        for round_number in range(most):
            for key, run in runs.items():
                if _takes_part(round_number, most, wanted[key]):
                    times[key].steady.append(_steady(run, times[key].calls, device))
                    bar.update()
        for round_number in range(max(singles.values())):
            for key, run in runs.items():
                if round_number < singles[key]:
                    latency, host = _single(run, device)
                    times[key].latency.append(latency)
                    times[key].host.append(host)
                    bar.update()
    if device.type != "cuda":
        for each in times.values():
            each.latency = each.steady
    return times


def _takes_part(round_number: int, rounds: int, wanted: int) -> bool:
    return (round_number + 1) * wanted // rounds > round_number * wanted // rounds


def _calls(milliseconds: float) -> int:
    return min(max(_FEWEST_CALLS, math.ceil(_SAMPLE_MS / max(milliseconds, 1e-6))), _MOST_CALLS)


def _steady(run: Run, calls: int, device: torch.device) -> float:
    """Milliseconds of a call among ``calls``."""
    if device.type != "cuda":
        return _single(run, device)[0]
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        before.record()
        for _ in range(calls):
            run()
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)) / calls


def _single(run: Run, device: torch.device) -> tuple[float, float]:
    """Milliseconds of one call on an idle device, and of the host in it."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        milliseconds = (time.perf_counter() - start) * 1e3
        return milliseconds, milliseconds
    with torch.cuda.device(device):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        start = time.perf_counter()
        run()
        host = (time.perf_counter() - start) * 1e3
        after.record()
        after.synchronize()
        return float(before.elapsed_time(after)), host
