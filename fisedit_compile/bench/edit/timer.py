"""Medians of wall times on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from fisedit_compile.bench.progress import say


@dataclass(frozen=True)
class Timer:
    """Medians of wall times, the device waited for at both ends."""

    device: torch.device
    repeats: int

    def milliseconds(self, label: str, run: Callable[[], object]) -> float:
        say(f"{label} ...")
        run()
        return median(self.once(run) for _ in range(self.repeats))

    def once(self, run: Callable[[], object]) -> float:
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return (time.perf_counter() - start) * 1e3

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
