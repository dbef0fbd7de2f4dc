"""What several bases keep of one U-Net call, beside each other in one place, as a batch of their edits reads it.

The place is filled anew before each step, so that a batch of edits takes the memory of one call beyond its bases. A
batch consists of the parts that guidance makes, each of all bases, one behind the other:

    base 0: [negative of a, of b | prompt of a, of b]   base 1: [negative of c | prompt of c]
    ->      [negative of a, of b, of c | prompt of a, of b, of c]

Rows of maps and of packed maps stand by themselves, and lie sample by sample, so that they are only copied.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fisedit_compile.cache.memory import require_room
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.ir.call import Signature
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.kernels.indexing.copy_tensors import PartCopies

#: Shape and dtype of each entry of a call's cache.
Specs = Mapping[CacheEntry, tuple[torch.Size, torch.dtype]]


class JoinedCalls:
    """A place on the device for one call of several bases.

    Args:
        signature: of the calls of the batch.
        specs: what their graphs read.
        parts: that guidance makes of the batch.
        device: of the place.
    """

    def __init__(self, signature: Signature, specs: Specs, parts: int, device: torch.device) -> None:
        self._signature, self._specs, self._parts, self._device = signature, specs, parts, device
        self._buffers: dict[CacheEntry, Tensor] = {}
        self._caches: dict[tuple[CacheEntry, ...], tuple[Recorded, list[_Copies]]] = {}

    def fill(
        self, sources: Sequence[Recorded], bring: Callable[[int], Recorded], *, maps_alone: bool = False
    ) -> Recorded:
        """The call of all bases; it is overwritten by the next.

        Args:
            sources: the call of each base, wherever it lies.
            bring: gives the call at a place among these on the device; asked for one after the other.
            maps_alone: take attention maps alone, which dense steps read.

        Raises:
            BaseMismatchError: the bases do not keep the same of the call, or were recorded at several timesteps.
            BaseMemoryError: there is no room for the place.
        """
        common = _common_entries(sources, maps_alone=maps_alone)
        entries = tuple(entry for entry in common if entry.kind == "attention" or entry in self._specs)
        _check_timesteps(sources)
        if missing := [entry for entry in entries if entry not in self._buffers]:
            self._make(missing, sources)
        if entries not in self._caches:
            kept = {entry: self._buffers[entry] for entry in entries}
            cache = Recorded(self._signature, sources[0].timesteps, kept)
            self._caches[entries] = cache, self._copies(entries, sources)
        cache, copies = self._caches[entries]
        for i, each in enumerate(copies):
            each.run(bring(i))
        cache.timesteps, cache.model = sources[0].timesteps, sources[0].model
        return cache

    def _copies(self, entries: Sequence[CacheEntry], sources: Sequence[Recorded]) -> list[_Copies]:
        """What brings the entries of each base to their places."""
        starts = dict.fromkeys(entries, 0)
        copies = []
        for source in sources:
            copies.append(_Copies())
            for entry in entries:
                before = starts[entry]
                starts[entry] += source[entry].shape[:1].numel()
                copies[-1].add(entry, self._targets(entry, source[entry], before))
        return copies

    def _targets(self, entry: CacheEntry, source: Tensor, before: int) -> list[Tensor]:
        """Where the rows of a base go, part by part; ``before`` are the rows of the bases before it."""
        buffer = self._buffers[entry]
        if entry.kind == "attention":  # of the conditional part alone
            return [buffer[before : before + len(source), :, : source.shape[2]]]
        if self._is_shared(entry, source):
            return [buffer]
        start, rows, every = (count // self._parts for count in (before, len(source), len(buffer)))
        return [buffer[first : first + rows] for first in range(start, len(buffer), every)]

    def _make(self, entries: Sequence[CacheEntry], sources: Sequence[Recorded]) -> None:
        shapes = {entry: self._shape(entry, [source[entry] for source in sources]) for entry in entries}
        dtypes = {entry: sources[0][entry].dtype for entry in entries}
        nbytes = sum(shape.numel() * dtypes[entry].itemsize for entry, shape in shapes.items())
        require_room(nbytes, self._device, f"{len(sources)} edits at a time", ["fewer edits at a time"])
        for entry, shape in shapes.items():
            # Zeros stand for the maps of tokens that one base keeps and another does not.
            self._buffers[entry] = torch.zeros(shape, dtype=dtypes[entry], device=self._device)

    def _shape(self, entry: CacheEntry, tensors: Sequence[Tensor]) -> torch.Size:
        """Of an entry of all bases.

        Raises:
            BaseMismatchError: theirs do not come to what the graphs read.
        """
        if all(self._is_shared(entry, tensor) for tensor in tensors):
            return tensors[0].shape
        rows = sum(map(len, tensors))
        if entry.kind == "attention":
            return torch.Size([rows, tensors[0].shape[1], max(tensor.shape[2] for tensor in tensors)])
        wanted, dtype = self._specs[entry]
        alike = all(tensor.shape[1:] == wanted[1:] and tensor.dtype is dtype for tensor in tensors)
        if not alike or rows != wanted[0]:
            raise BaseMismatchError(
                f"the bases hold {entry.node} as {', '.join(str(tuple(tensor.shape)) for tensor in tensors)}, which "
                f"does not come to the {tuple(wanted)} that a batch of their edits reads: edit them one by one"
            )
        return wanted

    def _is_shared(self, entry: CacheEntry, tensor: Tensor) -> bool:
        """Whether an entry is the same for all samples: it depends on the timestep alone, and has no row for each."""
        return entry.kind == "value" and tensor.shape == self._specs[entry][0]


class _Copies:
    """Copies of the entries of one base to where they lie beside those of others, the same at each step.

    There are hundreds, and the host has a few milliseconds between two steps: so the places are made once, and where
    the entries of a recorded call lie is looked up once.
    """

    def __init__(self) -> None:
        self._parts: dict[CacheEntry, list[Tensor]] = {}
        self._with_gaps: list[tuple[CacheEntry, Tensor]] = []
        self._copies: PartCopies | None = None
        self._addresses: WeakKeyDictionary[Recorded, Sequence[Tensor]] = WeakKeyDictionary()

    def add(self, entry: CacheEntry, targets: Sequence[Tensor]) -> None:
        """Copy an entry's rows to ``targets``, as many to each; attention maps have one, which may have gaps."""
        first = targets[0]
        if first.is_contiguous():
            self._parts[entry] = list(targets)
        else:
            self._with_gaps.append((entry, first))

    def run(self, source: Recorded) -> None:
        """Copy the entries of a call, which lies on the device of the places."""
        if self._copies is None:
            self._copies = PartCopies([*self._parts.values()])
        if source not in self._addresses:
            self._addresses[source] = self._copies.addresses([source[entry] for entry in self._parts])
        self._copies.run(self._addresses[source])
        for entry, target in self._with_gaps:
            target.copy_(source[entry])


def _common_entries(sources: Sequence[Recorded], *, maps_alone: bool) -> tuple[CacheEntry, ...]:
    """What all bases keep of the call.

    Raises:
        BaseMismatchError: one keeps something that another does not.
    """
    entries = [tuple(entry for entry in each if not maps_alone or entry.kind == "attention") for each in sources]
    for other in entries[1:]:
        if differing := set(entries[0]) ^ set(other):
            raise BaseMismatchError(
                f"one base keeps {next(iter(differing)).node} of the call and another does not: edit them one by one"
            )
    return entries[0]


def _check_timesteps(sources: Sequence[Recorded]) -> None:
    for other in sources[1:]:
        for one, timestep in zip(sources[0].timesteps, other.timesteps, strict=True):
            if one is not None and timestep is not None and not torch.equal(one, timestep):
                raise BaseMismatchError(
                    f"the calls were recorded at timesteps {one.tolist()} and {timestep.tolist()}: edit the bases one "
                    "by one"
                )
