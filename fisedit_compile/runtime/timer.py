"""Wall times of U-Net calls, taken without making the host wait."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class UNetTimer:
    """Wall times of U-Net calls by kind, with events on CUDA so that nothing waits inside the loop."""

    def __init__(self) -> None:
        self._marks: dict[str, list[tuple[Any, Any]]] = defaultdict(list)

    def time(self, kind: str, device: torch.device, run: Callable[[], Tensor]) -> Tensor:
        start = self._mark(device)
        out = run()
        self._marks[kind].append((start, self._mark(device)))
        return out

    def milliseconds(self) -> dict[str, list[float]]:
        """All times so far; waits for the device."""
        return defaultdict(list, {kind: [_elapsed(*pair) for pair in pairs] for kind, pairs in self._marks.items()})

    @staticmethod
    def _mark(device: torch.device) -> Any:
        if device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event


def _elapsed(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return (end - start) * 1e3
    end.synchronize()
    return float(start.elapsed_time(end))
