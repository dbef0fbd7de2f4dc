"""Where the tensors of a shard go as they are read: straight into their places, or by way of pinned memory to a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fisedit_compile.cache.host_tier import HostMemory
from fisedit_compile.cache.read_base import PIECE, BaseFolder
from fisedit_compile.cache.shard_file import Part
from fisedit_compile.errors import BaseMemoryError


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
        """The tensors of a shard by name, as they lie in its file, each in memory that begins as torch's own does.

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
            with self._room_for(shard):
                tensors.update(self._allocated(parts, device_of))
            for part in parts:
                for piece in self._pieces(shard, tensors.get(part.name), part.nbytes):
                    go_on()
                    yield piece

        try:
            self._opened.read_shard(shard, receive)
        finally:
            if self._stream is not None:  # also behind an error: nobody may get this memory while it is copied to
                self._stream.synchronize()
        return tensors

    def _allocated(self, parts: list[Part], device_of: Callable[[str], torch.device | None]) -> dict[str, Tensor]:
        """Memory for all parts of a shard that are kept, on the device or in host memory."""
        kept = [(part, device) for part in parts if (device := device_of(part.name)) is not None]
        away = [part for part, device in kept if device != self._device]
        rooms = self._host.room([part.nbytes for part in away])
        tensors = {part.name: _as(part, room) for part, room in zip(away, rooms, strict=True)}
        with torch.cuda.stream(self._owner):
            for part, _ in kept:
                if part.name not in tensors:
                    tensors[part.name] = _as(part, torch.empty(part.nbytes, dtype=torch.uint8, device=self._device))
        if self._stream is not None and self._owner is not None:  # somebody may still read what lay there before
            self._stream.wait_stream(self._owner)
        return tensors

    def _pieces(self, shard: str, tensor: Tensor | None, nbytes: int) -> Iterator[memoryview]:
        """The memory that is to be filled for a tensor; for one that is not kept, memory that is let go of."""
        flat = None if tensor is None else tensor.view(-1).view(torch.uint8)
        for start in range(0, nbytes, PIECE):
            end = min(start + PIECE, nbytes)
            if flat is not None and not flat.is_cuda:
                yield flat[start:end].numpy().data
                continue
            with self._room_for(shard):
                piece = torch.empty(end - start, dtype=torch.uint8, pin_memory=self._stream is not None)
            yield piece.numpy().data
            if flat is not None:
                with torch.cuda.stream(self._stream):
                    flat[start:end].copy_(piece, non_blocking=True)

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


def _as(part: Part, memory: Tensor) -> Tensor:
    return memory.view(part.dtype).view(part.shape)
