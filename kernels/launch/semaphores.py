"""Counters on the device by which the programs of a launch find out which of them comes last, and zeros behind them.

A launch finds the counters zero and leaves them zero. Launches on one stream run one after the other, so they can share
their counters. A CUDA graph may be replayed on any stream and needs counters of its own: those of ``use_semaphores``,
or else new ones for each of its launches, which cost the graph one more node that sets them to zero.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

#: Counters in a buffer, one for each output tile of a launch. A launch of more tiles fills the GPU and is not split.
_COUNT = 16384

#: Zeros behind the counters of a buffer, in 32-bit words: a row of 8192 channels in fp32, of 16384 in half precision.
_ZEROS = 8192

_buffers: dict[tuple[torch.device, int], torch.Tensor] = {}
_own = threading.local()


def semaphores(device: torch.device, count: int) -> torch.Tensor:
    """At least ``count`` counters, int32, all zero, for launches on the current stream.

    Raises:
        ValueError: the launch needs more counters than a buffer has.
    """
    if count > _COUNT:
        raise ValueError(f"a launch of {count} split tiles, over {_COUNT}: give a tile without splits")
    own: torch.Tensor | None = getattr(_own, "buffer", None)
    if own is not None and own.device == device:
        return own
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # They are in the graph's own memory, where nothing is zero before the graph runs: no other launch may use them.
        return new_semaphores(device)
    key = (device, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0)
    if key not in _buffers:
        _buffers[key] = new_semaphores(device)
    return _buffers[key]


def zero_row(rows: torch.Tensor, channels: int) -> torch.Tensor:
    """At least ``channels`` zeros of the dtype of ``rows``, on its device, to which no launch ever writes."""
    zeros = semaphores(rows.device, 0)[_COUNT:].view(rows.dtype)
    return zeros if len(zeros) >= channels else rows.new_zeros(channels)


def new_semaphores(device: torch.device) -> torch.Tensor:
    """A buffer of counters with zeros behind them, int32, all zero."""
    return torch.zeros(_COUNT + _ZEROS, dtype=torch.int32, device=device)


@contextlib.contextmanager
def use_semaphores(buffer: torch.Tensor) -> Iterator[None]:
    """A context in which launches of this thread use ``buffer``, made by :func:`new_semaphores`, on any stream."""
    before = getattr(_own, "buffer", None)
    _own.buffer = buffer
    try:
        yield
    finally:
        _own.buffer = before
