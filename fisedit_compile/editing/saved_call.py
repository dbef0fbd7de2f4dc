"""A U-Net call of a base whose shard is on its way from the disk, or stays there."""

from __future__ import annotations

from typing import Any

import torch

from fisedit_compile.cache.read_ahead import ReadAhead
from fisedit_compile.cache.reading import Reading, Shard
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.editing.recorded_call import RecordedCall
from fisedit_compile.runtime.model_state import ModelState


class SavedCall(RecordedCall):
    """What a call of a saved base keeps; whoever asks for it waits until its shard is in.

    A copy, or one that is pickled, is whole.

    Args:
        step: the denoising step.
        reading: of the base.
        index: of the shard among those that are read.
        shard: the shard.
        model: the state of the U-Net, which was not known yet when the reading began.
        stays: whether the shard stays on the disk, and takes memory only as long as an edit needs it.
    """

    _reading: Reading | ReadAhead
    _index: int
    _nbytes: int
    _device: torch.device
    _model: ModelState
    _stays: bool

    def __init__(
        self,
        step: int,
        reading: Reading | ReadAhead,
        index: int,
        shard: Shard,
        model: ModelState,
        *,
        stays: bool = False,
    ) -> None:
        vars(self).update(step=step, _reading=reading, _index=index, _model=model, _stays=stays)
        vars(self).update(_nbytes=shard.nbytes, _device=shard.device)  # the shard itself holds what reads it

    @property
    def cache(self) -> Recorded:
        """What the call keeps.

        Raises:
            BaseMemoryError, BaseStorageError, DamagedBaseError, SavedBaseError: see
                :meth:`fisedit_compile.cache.reading.Reading.get`.
        """
        found = self._reading.get(self._index)
        found.model = self._model
        if self._stays:  # it is let go of while what is launched here may still read it
            for tensor in {each.untyped_storage().data_ptr(): each for each in found.values() if each.is_cuda}.values():
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return found

    @property
    def is_in(self) -> bool:
        return self._reading.is_in(self._index)

    @property
    def stays_on_disk(self) -> bool:
        return self._stays

    @property
    def nbytes(self) -> int:
        return 0 if self._stays else self._nbytes

    @property
    def device(self) -> torch.device:
        return self._device

    def wait(self) -> None:
        self._reading.wait()

    def __repr__(self) -> str:
        return f"SavedCall(step={self.step}, is_in={self.is_in})"  # that of a dataclass would wait

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordedCall, (self.step, self.cache)
