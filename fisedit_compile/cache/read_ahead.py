"""Shards of a base that stays on the disk: read when a step needs them, and the next ones ahead of the steps."""

from __future__ import annotations

import copy
import os
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

from fisedit_compile.cache.reading import Shard
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.errors import SavedBaseError

#: Shards that are read ahead of the one that was asked for: as many as are read in the time of a step, and some more.
AHEAD = 3


class ReadAhead:
    """Reads shards as they are asked for, any number of times, and keeps the last one and :data:`AHEAD` more.

    Each is held to its checksum every time it is read. What cannot be read is an error of who asks for it, and of
    nobody else: a file that is mended is read again.

    Args:
        name: of the base, for messages.
        shards: in the order in which steps need them.
    """

    def __init__(self, name: str, shards: Sequence[Shard]) -> None:
        self._name, self._shards, self._process = name, shards, os.getpid()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-base")  # it ends with this object
        self._kept: dict[int, Future[Recorded]] = {}
        self._wanted: Counter[int] = Counter()  # by how many threads that wait now
        self._last = -1
        self._turn = threading.Lock()

    def is_in(self, index: int) -> bool:
        """Whether a shard can be had without waiting."""
        found = self._kept.get(index)
        return found is not None and found.done()

    def get(self, index: int) -> Recorded:
        """What a shard holds, as soon as it is read.

        Raises:
            BaseMemoryError: there is no memory left for it.
            BaseStorageError: the file system does not give its file.
            DamagedBaseError: its file is not what was written.
            SavedBaseError: in a process that was forked since the base was loaded.
        """
        if os.getpid() != self._process:
            raise SavedBaseError(f"{self._name} was loaded before this process was forked: load it again")
        with self._turn:
            onwards = index >= self._last or index == 0  # an edit asks for a call more than once
            self._last = index
            behind = min(index + (AHEAD if onwards else 0) + 1, len(self._shards))
            self._let_go(self._kept.keys() - set(range(index, behind)))
            for each in range(index, behind):
                if each not in self._kept or (self._kept[each].done() and self._kept[each].exception() is not None):
                    self._kept[each] = self._thread.submit(self._shards[each].read, _go_on)
            found = self._kept[index]
            self._wanted[index] += 1
        try:
            error = found.exception()
        finally:
            with self._turn:
                self._wanted[index] -= 1
        if error is not None:
            raise copy.copy(error).with_traceback(None)
        return found.result()

    def stop(self) -> None:
        """Let go of what was read, and wait for what is being read."""
        with self._turn:
            going, self._last = self._let_go(list(self._kept)), -1
        wait(going)

    def _let_go(self, indices: Iterable[int]) -> list[Future[Recorded]]:
        """Keep some shards no longer; those are returned that are being read, or that another thread waits for."""
        going = [(index, self._kept.pop(index)) for index in indices]
        return [each for index, each in going if self._wanted[index] or not each.cancel()]

    wait = stop


def _go_on() -> None:
    """What is being read is read to its end: it is little."""
