"""What a call does on a GPU beside taking time: kernels, busy time, memory; and whether anything was compiled anew."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

MIB = 2**20

_COPIES = ("Memcpy", "Memset")


@dataclass(frozen=True)
class Kernels:
    """What the device ran: the number of kernels (copies by the driver left out), and milliseconds with work on it."""

    launches: int
    busy_ms: float


def profile_kernels(run: Callable[[], object], device: torch.device) -> Kernels | None:
    """One call under ``torch.profiler``; None on the CPU, or where the profiler sees no kernels.

    The kernels of a CUDA graph are counted one by one. A profiler once started may slow later launches: profile last.
    """
    from torch.profiler import ProfilerActivity, profile, supported_activities

    if device.type != "cuda" or ProfilerActivity.CUDA not in supported_activities():
        return None
    try:
        with torch.cuda.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the profiler, that there was no warm-up
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                run()
                torch.cuda.synchronize()
    except RuntimeError:  # CUPTI is missing, or taken by another profiler
        return None
    return kernels_of(profiler.events() or ())


def kernels_of(events: Iterable[Any]) -> Kernels | None:
    """Count the events of a profile."""
    on_device = [e for e in events if e.device_type is torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    launches = sum(not event.name.startswith(_COPIES) for event in on_device)
    if not launches:
        return None
    microseconds, until = 0.0, float("-inf")
    for event in sorted(on_device, key=lambda event: event.time_range.start):
        start, end = event.time_range.start, event.time_range.end
        microseconds += max(0.0, end - max(start, until))  # kernels may overlap
        until = max(until, end)
    return Kernels(launches, microseconds / 1e3)


def peak_mb(run: Callable[[], object], device: torch.device) -> float | None:
    """MiB that tensors held at most during a call beyond what they held before it; None on the CPU.

    A CUDA graph's own memory is no part of it, see :func:`graph_pool_mb`, but in the call that records it.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def allocated_mb(device: torch.device) -> float | None:
    """MiB that tensors hold now; None on the CPU."""
    return torch.cuda.memory_allocated(device) / MIB if device.type == "cuda" else None


def graph_pool_mb(device: torch.device) -> float:
    """MiB reserved for CUDA graphs: all private pools of the allocator. 0 on the CPU."""
    if device.type != "cuda":
        return 0.0
    index = torch.cuda.current_device() if device.index is None else device.index
    segments = torch.cuda.memory_snapshot()
    private = (s for s in segments if s["device"] == index and tuple(s.get("segment_pool_id", (0, 0))) != (0, 0))
    return sum(segment["total_size"] for segment in private) / MIB


def dynamo_graphs() -> int:
    """How many graphs Dynamo has compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
