"""Calls of a base that go to the disk while it is recorded, so that they never lie in memory together."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future

from fisedit_compile.cache.base_manifest import BaseFile, call_shard
from fisedit_compile.cache.packed_base import PackedBase
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.cache.write_base import BaseWriter
from fisedit_compile.editing.pack_base import entries_of
from fisedit_compile.editing.recorded_call import WrittenCall

#: Calls that wait to be written, with those that are, at most. Where the disk is slower, recording waits for it.
_MOST_WAITING = 4


class DiskRecord:
    """Takes the calls of one base to the disk.

    Args:
        writer: of the base.
    """

    def __init__(self, writer: BaseWriter) -> None:
        self.writer = writer
        self._taken = 0
        self._waiting: deque[Future[BaseFile]] = deque()

    def take(self, step: int, cache: Recorded) -> WrittenCall:
        """Begin to write a call; its tensors are let go of when they are.

        Raises:
            BaseStorageError: this call or one before it cannot be written.
        """
        packed, shard = PackedBase(), call_shard(self._taken)
        entries = entries_of(cache, packed.keep_in(shard))
        self._taken += 1
        if shard in packed.shards:
            while len(self._waiting) >= _MOST_WAITING:
                self._waiting.popleft().result()
            self._waiting.append(self.writer.begin_shard(shard, packed.shards[shard]))
        nbytes = sum(tensor.nbytes for tensor in cache.values())
        device = next((tensor.device for tensor in cache.values()), None)
        return WrittenCall(step, cache.with_values({}), entries, nbytes, device)
