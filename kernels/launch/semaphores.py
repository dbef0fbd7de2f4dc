"""Counters on the device by which the programs of a launch find out which of them comes last.

A launch finds them zero and leaves them zero. Launches on one stream run one after the other and share their counters;
a CUDA graph, which may be replayed on any stream, has its own: those of ``use_semaphores``, or else some that each of
its launches sets to zero, which is one more node of the graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

#: Counters of a buffer: output tiles of a launch that is split. A launch of more tiles fills the GPU without a split.
_COUNT = 16384

_buffers: dict[tuple[torch.device, int], torch.Tensor] = {}
_own = threading.local()


def semaphores(device: torch.device, count: int) -> torch.Tensor:
    """At least ``count`` counters, int32, all zero, for launches on the current stream.

    Raises:
        ValueError: more than there are.
    """
    if count > _COUNT:
        raise ValueError(f"a launch of {count} split tiles, over {_COUNT}: give a tile without splits")
    own: torch.Tensor | None = getattr(_own, "buffer", None)
    if own is not None and own.device == device:
        return own
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Never kept: they are in the graph's memory, and nothing is zero there until the graph runs.
        return new_semaphores(device)
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    if key not in _buffers:
        _buffers[key] = new_semaphores(device)
    return _buffers[key]


def new_semaphores(device: torch.device) -> torch.Tensor:
    """A buffer of counters."""
    return torch.zeros(_COUNT, dtype=torch.int32, device=device)


@contextlib.contextmanager
def use_semaphores(buffer: torch.Tensor) -> Iterator[None]:
    """Launches of this thread use ``buffer``, of :func:`new_semaphores`, on any stream."""
    before = getattr(_own, "buffer", None)
    _own.buffer = buffer
    try:
        yield
    finally:
        _own.buffer = before
