"""Where the tensors of a shard go as they are read: straight into host memory, or by way of pinned memory to a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

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

    It has a piece at most, unless one tensor alone is larger, so that pieces of pinned memory are filled without gaps.
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
            go_on: called before each piece; what it raises ends the reading.

        Raises:
            BaseMemoryError: they do not fit into memory.
            BaseStorageError: the file system does not give the file.
            DamagedBaseError: the file is not what was written.
        """
        tensors: dict[str, Tensor] = {}

        def receive(parts: list[Part]) -> Iterator[memoryview]:
            stretches = _stretches(parts, device_of)
            with self._room_for(shard):
                memories = self._allocated(stretches)
            for stretch, memory in zip(stretches, memories, strict=True):
                for piece in self._pieces(shard, memory):
                    go_on()
                    yield piece
                tensors.update(zip(stretch.places, tensors_in(memory, stretch.places.values()), strict=True))

        try:
            self._opened.read_shard(shard, receive)
        finally:
            if self._stream is not None:  # also behind an error: nobody may get this memory while it is copied to
                self._stream.synchronize()
        return {name: tensor for name, tensor in tensors.items() if device_of(name) is not None}

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

    def _pieces(self, shard: str, memory: Tensor) -> Iterator[memoryview]:
        """What is to be filled for a stretch, one piece behind the other."""
        for start in range(0, len(memory), PIECE):
            part = memory[start : start + PIECE]
            if not part.is_cuda:
                yield part.numpy().data
                continue
            with self._room_for(shard):
                piece = torch.empty(len(part), dtype=torch.uint8, pin_memory=True)
            yield piece.numpy().data
            with torch.cuda.stream(self._stream):
                part.copy_(piece, non_blocking=True)

    @contextmanager
    def _room_for(self, shard: str) -> Iterator[None]:
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


def _stretches(parts: list[Part], device_of: Callable[[str], torch.device | None]) -> list[_Stretch]:
    """All parts of a shard in order, each of which lies aligned."""
    stretches: list[_Stretch] = []
    for part in parts:
        device = device_of(part.name) or (stretches[-1].device if stretches else torch.device("cpu"))
        if not stretches or not stretches[-1].takes(part, device):
            stretches.append(_Stretch(device))
        stretches[-1].add(part)
    return stretches
