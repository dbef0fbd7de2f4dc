"""Interleaved timing: alternatives take turns in one loop, so that a slow spell of the machine slows all of them."""

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

#: A sample on CUDA is the mean over back-to-back calls: as many as take this long together, within these limits.
_SAMPLE_MS = 10.0
_FEWEST_CALLS_OF_SAMPLE, _MOST_CALLS_OF_SAMPLE = 2, 64

#: How many calls on an idle device are timed at most; a few are enough, because latency and host time spread little.
_MOST_SINGLES = 10


@dataclass(frozen=True)
class Spread:
    """The median, 10th and 90th percentile of some times, in milliseconds."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, milliseconds: list[float]) -> Spread:
        p10, median, p90 = np.percentile(milliseconds, (10, 50, 90))
        return cls(float(median), float(p10), float(p90))


@dataclass
class Times:
    """The samples of one run's times, in milliseconds a call.

    Attributes:
        steady: times of a call that follows others of its kind, as the steps of a pipeline do.
        latency: times of a single call on an idle device, from its launch to its end; on the CPU the same as
        ``steady``.
        host: how long each of those single calls kept the host busy; empty on the CPU.
        calls: over how many calls each sample of ``steady`` is the mean.
    """

    steady: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    calls: int = 1

    @property
    def host_ms(self) -> float | None:
        """The median of ``host``; None on the CPU."""
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

    On the CPU a sample is the time of one call. On CUDA it is the time between two events around a few back-to-back
    calls, divided by their number. One more call comes before the first event, so that the device is idle during a
    sample only if the host cannot keep up. A few rounds of single calls on an idle device follow.

    Args:
        runs: the calls to time, by any key.
        repeats: the number of samples, for all runs or by key; a run with fewer than the most takes part in evenly
            spaced rounds.
        warmup: the number of rounds that are not kept, at least one.
        device: the device that the runs use.
        label: what the progress bar says.
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
            each.calls = calls_of_sample(fastest[key]) if device.type == "cuda" else 1
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


def calls_of_sample(milliseconds: float) -> int:
    """How many calls a sample takes if one call takes ``milliseconds``."""
    calls = math.ceil(_SAMPLE_MS / max(milliseconds, 1e-6))
    return min(max(_FEWEST_CALLS_OF_SAMPLE, calls), _MOST_CALLS_OF_SAMPLE)


def _steady(run: Run, calls: int, device: torch.device) -> float:
    """The mean milliseconds of each of ``calls`` back-to-back calls."""
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
    """The milliseconds of one call on an idle device, and for how many of them it kept the host busy."""
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
