"""Where the tensors of a shard go as they are read: straight into host memory, or by way of pinned memory to a GPU."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, groupby

import torch
from torch import Tensor

from fisedit_compile.cache.host_tier import HostMemory
from fisedit_compile.cache.read_base import BaseFolder
from fisedit_compile.cache.shard_file import PIECE, Part
from fisedit_compile.cache.tensors_in_memory import Place, tensors_in
from fisedit_compile.errors import BaseMemoryError

#: To what tensors are aligned, in bytes: where one that lies behind another is not, a stretch of memory begins.
_ALIGNMENT = 64


@dataclass
class _Stretch:
    """Tensors of a shard that lie in memory as they do in the file, one behind another.

    It has a piece at most, unless one tensor alone is larger, so that room is found for it between what others hold.
    """

    device: torch.device
    nbytes: int = 0
    places: dict[str, Place] = field(default_factory=dict)

    def takes(self, part: Part, device: torch.device) -> bool:
        return device == self.device and self.nbytes % _ALIGNMENT == 0 and self.nbytes + part.nbytes <= PIECE

    def add(self, part: Part) -> None:
        self.places[part.name] = Place(self.nbytes, part.dtype, part.shape)
        self.nbytes += part.nbytes


class Landing:
    """Reads shards of one base into memory. Any number of threads may use it.

    Args:
        opened: the base's folder.
        device: that edits of the base run on. Tensors of other devices come to host memory, pinned where this is a GPU.
            Those of a GPU belong to its stream that is the current one here.
    """

    def __init__(self, opened: BaseFolder, device: torch.device) -> None:
        self._opened, self._device = opened, device
        self._host = HostMemory(device)
        self._owner: torch.cuda.Stream | None = None
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._owner = torch.cuda.current_stream(device)
            # Of a pool of its own: torch hands a few streams out in turns, and one of these may be captured meanwhile.
            self._stream = torch.cuda.Stream(device, priority=-1)

    def read(
        self, shard: str, device_of: Callable[[str], torch.device | None], go_on: Callable[[], None] = lambda: None
    ) -> dict[str, Tensor]:
        """The tensors of a shard by name, as they lie in its file.

        Args:
            shard: name of its file.
            device_of: where a tensor goes, by its name; one that goes nowhere is not kept.
            go_on: called before each part, by several threads; what it raises ends the reading.

        Raises:
            BaseMemoryError: they do not fit into memory.
            BaseStorageError: the file system does not give the file.
            DamagedBaseError: the file is not what was written.
        """
        landed: list[_Landed] = []

        def receive(parts: list[Part]) -> _Landed:
            stretches = _stretches(parts, device_of)
            with self.room_for(shard):
                landed.append(_Landed(self, shard, stretches, self._allocated(stretches), go_on))
            return landed[0]

        try:
            self._opened.read_shard(shard, receive)
        finally:
            if self._stream is not None:  # also behind an error: nobody may get this memory while it is copied to
                self._stream.synchronize()
        return {name: tensor for name, tensor in landed[0].tensors() if device_of(name) is not None}

    def _allocated(self, stretches: list[_Stretch]) -> list[Tensor]:
        """Memory for each stretch, on the device or of the host; uint8."""
        rooms = iter(self._host.room([each.nbytes for each in stretches if each.device != self._device]))
        memories = []
        with torch.cuda.stream(self._owner):
            for each in stretches:
                away = each.device != self._device
                memories.append(
                    next(rooms) if away else torch.empty(each.nbytes, dtype=torch.uint8, device=self._device)
                )
        if self._stream is not None and self._owner is not None:  # somebody may still read what lay there before
            self._stream.wait_stream(self._owner)
        return memories

    @contextmanager
    def room_for(self, shard: str) -> Iterator[None]:
        """Within the context memory is allocated; what torch says of that is an error of the base."""
        try:
            yield
        except BaseMemoryError:
            raise
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError, too
            raise BaseMemoryError(
                f"{self._opened.folder} does not fit beside what {self._device} and the host hold: free some of their "
                f"memory ({shard}: {error})"
            ) from error

    @contextmanager
    def copied(self, shard: str, memories: Sequence[Tensor]) -> Iterator[memoryview]:
        """Pinned memory, which is copied to some pieces of the device's behind the context."""
        with self.room_for(shard):
            pinned = torch.empty(sum(map(len, memories)), dtype=torch.uint8, pin_memory=True)
        yield pinned.numpy().data
        with torch.cuda.stream(self._stream):
            for memory, piece in zip(memories, pinned.split(list(map(len, memories))), strict=True):
                memory.copy_(piece, non_blocking=True)


class _Landed:
    """The memory of one shard; see :class:`~fisedit_compile.cache.read_base.ShardMemory`."""

    def __init__(
        self,
        landing: Landing,
        shard: str,
        stretches: Sequence[_Stretch],
        memories: Sequence[Tensor],
        go_on: Callable[[], None],
    ) -> None:
        self._landing, self._shard, self._go_on = landing, shard, go_on
        self._stretches, self._memories = stretches, memories
        self._starts = list(accumulate((each.nbytes for each in stretches[:-1]), initial=0))

    @contextmanager
    def part(self, start: int, end: int) -> Iterator[list[memoryview]]:
        self._go_on()
        with ExitStack() as copies:
            views: list[memoryview] = []
            for on_device, pieces in groupby(self._pieces(start, end), lambda piece: piece.is_cuda):
                if on_device:
                    views.append(copies.enter_context(self._landing.copied(self._shard, list(pieces))))
                else:
                    views += [piece.numpy().data for piece in pieces]
            yield views

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors by name."""
        for stretch, memory in zip(self._stretches, self._memories, strict=True):
            yield from zip(stretch.places, tensors_in(memory, stretch.places.values()), strict=True)

    def _pieces(self, start: int, end: int) -> Iterator[Tensor]:
        """The memory of some bytes, one stretch behind the other."""
        for i in range(bisect_right(self._starts, start) - 1, bisect_left(self._starts, end)):
            first, memory = self._starts[i], self._memories[i]
            yield memory[max(start - first, 0) : end - first]


def _stretches(parts: list[Part], device_of: Callable[[str], torch.device | None]) -> list[_Stretch]:
    """All parts of a shard in order, each of which lies aligned."""
    stretches: list[_Stretch] = []
    for part in parts:
        device = device_of(part.name) or (stretches[-1].device if stretches else torch.device("cpu"))
        if not stretches or not stretches[-1].takes(part, device):
            stretches.append(_Stretch(device))
        stretches[-1].add(part)
    return stretches
