"""A U-Net call of a base whose shard may still be on its way from the disk."""

from __future__ import annotations

from typing import Any

import torch

from fisedit_compile.cache.reading import Reading, Shard
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.editing.base import RecordedCall
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
    """

    _reading: Reading
    _index: int
    _nbytes: int
    _device: torch.device
    _model: ModelState

    def __init__(self, step: int, reading: Reading, index: int, shard: Shard, model: ModelState) -> None:
        vars(self).update(step=step, _reading=reading, _index=index, _model=model)
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
        return found

    @property
    def is_in(self) -> bool:
        return self._reading.is_in(self._index)

    @property
    def nbytes(self) -> int:
        return self._nbytes

    @property
    def device(self) -> torch.device:
        return self._device

    def wait(self) -> None:
        self._reading.wait()

    def __repr__(self) -> str:
        return f"SavedCall(step={self.step}, is_in={self.is_in})"  # that of a dataclass would wait

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordedCall, (self.step, self.cache)
