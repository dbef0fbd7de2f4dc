"""A base in host memory: how its calls leave the device as they are recorded, and come back ahead of the steps.

What a call keeps goes in few copies: its tensors lie one behind another in pinned memory. While one step of an edit
runs, the next one's call is on its way to the device, on a stream of its own. So a step waits only where the way takes
longer than a step.

Bases whose memory is not pinned, such as copies, are brought as well, but the host waits for each of their copies.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.cache.tensors_in_memory import Place, tensors_in
from fisedit_compile.errors import BaseMemoryError
from fisedit_compile.ir.requests import CacheEntry

#: Of streams that copy: torch hands the streams of a priority out in turns, and of the common one are those on which
#: graphs are captured, where nothing else may run meanwhile.
_PRIORITY = -1

_ALIGNMENT = 256  # bytes, as torch's own allocator aligns

#: Bytes of a piece of pinned memory. The allocator rounds pieces up to a power of two, so one of that size wastes none.
_CHUNK = 64 * 2**20


class HostMemory:
    """Takes the calls of one base to host memory, without waiting for the device that they come from.

    Args:
        device: that edits of the base run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=_PRIORITY) if self._cuda else None
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._taken = 0
        self._turn = threading.Lock()

    def room(self, sizes: Sequence[int]) -> list[Tensor]:
        """Host memory for the tensors of one call, uint8, as many bytes each as asked for; any thread may ask."""
        rooms = []
        with self._turn:
            for nbytes in sizes:
                if not self._fits(nbytes):
                    self._begin_chunk(nbytes)
                rooms.append(self._chunk[self._taken : self._taken + nbytes])
                self._taken += _aligned(nbytes)
        return rooms

    @torch.inference_mode(False)
    @torch.no_grad()
    def take(self, cache: Recorded) -> Recorded:
        """The same call in host memory, whose values are there after :meth:`finish`."""
        kept: dict[CacheEntry, Tensor] = {}
        for piece, entries in self._pieces(cache):
            tensors = [cache[entry] for entry in entries]
            kept |= _parts(piece, entries, cache)
            whole = torch.empty_like(piece, device=tensors[0].device) if tensors[0].is_cuda else piece
            parts = list(_parts(whole, entries, cache).values())
            torch._foreach_copy_(parts, tensors)
            if self._stream is None or whole is piece:
                continue
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                piece.copy_(whole, non_blocking=True)
            whole.record_stream(self._stream)
        return cache.with_values({entry: kept[entry] for entry in cache})

    def finish(self) -> None:
        """Wait until all that was taken has arrived."""
        if self._stream is not None:
            self._stream.synchronize()

    def _pieces(self, cache: Recorded) -> Iterator[tuple[Tensor, dict[CacheEntry, int]]]:
        """Stretches of host memory, and where in each of them entries of a call will lie."""
        entries: dict[CacheEntry, int] = {}
        start = self._taken
        for entry, tensor in cache.items():
            if not self._fits(tensor.nbytes):
                if entries:
                    yield self._chunk[start : self._taken], entries
                self._begin_chunk(tensor.nbytes)
                entries, start = {}, 0
            entries[entry] = self._taken - start
            self._taken += _aligned(tensor.nbytes)
        if entries:
            yield self._chunk[start : self._taken], entries

    def _fits(self, nbytes: int) -> bool:
        return self._taken + _aligned(nbytes) <= len(self._chunk)

    def _begin_chunk(self, nbytes: int) -> None:
        size = max(_CHUNK, _aligned(nbytes))
        try:
            self._chunk = torch.empty(size, dtype=torch.uint8, pin_memory=self._cuda)
        except RuntimeError as error:  # torch has no error of its own for it
            raise BaseMemoryError(
                f"the host gives no {size / 2**20:.0f} MiB more for a base: let go of others, or generate one of fewer "
                f"steps ({error})"
            ) from error
        self._taken = 0


@torch.inference_mode(False)
@torch.no_grad()
def brought_to_host(tensors: Sequence[Tensor], places: Sequence[Place], nbytes: int) -> Tensor:
    """Tensors in one piece of host memory, uint8 ``[nbytes]``; a GPU is waited for once, not for each.

    What others have launched on the GPU is not waited for, so that the tensors' values have to be there.

    Args:
        tensors: any, of the host and of one GPU.
        places: where each of them comes to lie.
        nbytes: of the memory.
    """
    device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
    host = torch.empty(-(-nbytes // 16) * 16, dtype=torch.uint8, pin_memory=device is not None)
    stream = None if device is None else torch.cuda.Stream(device, priority=_PRIORITY)
    with torch.cuda.stream(stream):
        plain = [each.resolve_conj().resolve_neg() if each.is_conj() or each.is_neg() else each for each in tensors]
        torch._foreach_copy_(tensors_in(host, places), plain, non_blocking=stream is not None)
    if stream is not None:
        stream.synchronize()
    return host[:nbytes]


@dataclass(frozen=True)
class _Run:
    """A stretch of memory that is copied at once: its bytes, and where in them entries of a call lie."""

    memory: Tensor
    entries: dict[CacheEntry, int]


#: How the calls that were brought lie in host memory.
_runs_of: WeakKeyDictionary[Recorded, list[_Run]] = WeakKeyDictionary()


class _Slot:
    """A place on the device for one call: what lies there or is on its way, and when it may be read and written."""

    def __init__(self) -> None:
        self.caches: WeakKeyDictionary[Recorded, Recorded] = WeakKeyDictionary()  # each as it lies here
        self.buffer: Tensor | None = None
        self.ready: torch.cuda.Event | None = None
        self.free: torch.cuda.Event | None = None
        self._holds: weakref.ref[Recorded] | None = None

    def holds(self, cache: Recorded) -> bool:
        return self._holds is not None and self._holds() is cache

    def fill(self, cache: Recorded, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        """Copy a call here."""
        if cache not in _runs_of:
            _runs_of[cache] = _runs(cache)
        runs = _runs_of[cache]
        starts = list(accumulate((_aligned(len(run.memory)) for run in runs), initial=0))
        if self.buffer is None or len(self.buffer) < starts[-1]:
            self.buffer = torch.empty(starts[-1], dtype=torch.uint8, device=device)
            self.caches.clear()
            if stream is not None:
                self.buffer.record_stream(stream)
                self.free = torch.cuda.current_stream(device).record_event()
        targets = [self.buffer[start : start + len(run.memory)] for start, run in zip(starts, runs, strict=False)]
        if stream is not None and self.free is not None:
            stream.wait_event(self.free)
        self._holds = None  # until all of it is on its way
        with torch.cuda.stream(stream):
            for target, run in zip(targets, runs, strict=True):
                target.copy_(run.memory, non_blocking=True)
            self.ready = None if stream is None else stream.record_event()
        self._holds = weakref.ref(cache)
        if cache not in self.caches:
            moved: dict[CacheEntry, Tensor] = {}
            for target, run in zip(targets, runs, strict=True):
                moved |= _parts(target, run.entries, cache)
            self.caches[cache] = cache.with_values({entry: moved[entry] for entry in cache})


class Staging:
    """Brings calls of bases in host memory to a device, each ahead of the step that reads it.

    A call lies where it was brought until the call after the next is brought. One thread uses it at a time.

    Args:
        device: that the steps run on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device, priority=_PRIORITY) if device.type == "cuda" else None
        self._current, self._other = _Slot(), _Slot()

    @torch.inference_mode(False)  # what is made here is written to in later edits
    @torch.no_grad()
    def bring(self, cache: Recorded, following: Recorded | None = None) -> Recorded:
        """A call on the device, for what is launched on the current stream behind this; and begin with the next one.

        Args:
            cache: the call; one that lies on the device is returned as it is.
            following: what will be brought after it.
        """
        if not self._is_away(cache):
            return cache
        if not self._current.holds(cache):
            self._current, self._other = self._other, self._current
            if self._stream is not None:  # the steps that read the other place were all launched before
                self._other.free = torch.cuda.current_stream(self.device).record_event()
            if not self._current.holds(cache):
                self._current.fill(cache, self.device, self._stream)
        if self._current.ready is not None:
            torch.cuda.current_stream(self.device).wait_event(self._current.ready)
        ahead = None if following is cache else following
        if ahead is not None and self._is_away(ahead) and not self._other.holds(ahead):
            self._other.fill(ahead, self.device, self._stream)
        return self._current.caches[cache]

    def _is_away(self, cache: Recorded) -> bool:
        first = next(iter(cache.values()), None)  # a call that keeps nothing has none
        return first is not None and first.device != self.device


def _parts(
    piece: Tensor, entries: Mapping[CacheEntry, int], like: Mapping[CacheEntry, Tensor]
) -> dict[CacheEntry, Tensor]:
    """Tensors like those of a call, contiguous, from where in ``piece`` each of them begins."""
    places = [Place(start, like[entry].dtype, tuple(like[entry].shape)) for entry, start in entries.items()]
    return dict(zip(entries, tensors_in(piece, places), strict=True))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _runs(cache: Recorded) -> list[_Run]:
    """The memory of a call in as few stretches as it can be copied in."""
    bounds: list[tuple[int, int]] = []  # first byte and the one behind the last, in the storage
    storages: list[torch.UntypedStorage] = []
    entries: list[dict[CacheEntry, int]] = []
    for entry, tensor in sorted(cache.items(), key=lambda each: each[1].data_ptr()):
        storage = tensor.untyped_storage()
        start = tensor.data_ptr() - storage.data_ptr()
        same = bounds and storage.data_ptr() == storages[-1].data_ptr()
        if not same or start > _aligned(bounds[-1][1]):
            bounds.append((start, start))
            storages.append(storage)
            entries.append({})
        first, _ = bounds[-1]
        bounds[-1] = first, start + tensor.nbytes
        entries[-1][entry] = start - first
    return [
        _Run(torch.empty(0, dtype=torch.uint8).set_(storage, first, (end - first,), (1,)), places)
        for storage, (first, end), places in zip(storages, bounds, entries, strict=True)
    ]
