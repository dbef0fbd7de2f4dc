"""Reads the shards of a base in the background, in the order in which steps need them."""

from __future__ import annotations

import copy
import logging
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from fisedit_compile.cache.memory import promise
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.errors import FiseditError, SavedBaseError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """What has to be read of a base: one U-Net call.

    Attributes:
        read: reads it. It is given what it has to call between the pieces of the file, and lets through what that
            raises.
        nbytes: memory that it takes, which is counted as taken from now on.
        device: where it takes it.
    """

    read: Callable[[Callable[[], None]], Recorded]
    nbytes: int
    device: torch.device


class Reading:
    """Shards that are read from now on by a thread of its own, one after the other, each by several threads.

    One that cannot be read makes the base useless: the others are not read then, and those that were are let go of. So
    it is when nobody holds the object any more, and when the interpreter exits.

    Args:
        name: of the base, for messages.
        shards: in the order in which they are needed.
        folder: what has to be closed when the last one is in, or none will be any more: the lock of the base's folder.
    """

    def __init__(self, name: str, shards: Sequence[Shard], folder: ExitStack) -> None:
        work = self._work = _Work(name, shards, folder)
        weakref.finalize(self, work.stop)  # the thread holds the work alone
        try:
            threading.Thread(target=work.do, args=(shards,), name="read-base").start()
        except RuntimeError:  # the system has no more threads
            work.stop()
            work.do(shards)
            raise

    def is_in(self, index: int) -> bool:
        """Whether a shard was read."""
        return index in self._work.read

    def get(self, index: int) -> Recorded:
        """What a shard holds, as soon as it is in.

        Raises:
            BaseMemoryError: there is no memory left for a shard of the base.
            BaseStorageError: the file system does not give a file.
            DamagedBaseError: a file is not what was written.
            SavedBaseError: it was not read to its end, in a process that forked or ends.
        """
        return self._work.get(index)

    def stop(self) -> None:
        """Read no further; returns when nothing of the folder is needed any more."""
        self._work.stop()
        self._work.end()

    def wait(self) -> None:
        """Wait until all shards are in, and nothing of the folder is needed any more.

        Raises:
            BaseMemoryError, BaseStorageError, DamagedBaseError, SavedBaseError: see :meth:`get`.
        """
        self._work.wait()


class _Work:
    """What the thread that reads shares with those who wait for it."""

    def __init__(self, name: str, shards: Sequence[Shard], folder: ExitStack) -> None:
        self.read: dict[int, Recorded] = {}
        self._name, self._left, self._folder = name, len(shards), folder
        self._changed, self._process = threading.Condition(), os.getpid()
        self._failure: BaseException | None = None
        self._stopped = False
        for shard in shards:
            promise(shard.nbytes, shard.device)
        if not shards:
            folder.close()

    def stop(self) -> None:
        """Read no further. No lock is taken: a garbage collection may call this within any other call."""
        self._stopped = True

    def do(self, shards: Sequence[Shard]) -> None:
        """Read the shards in order."""
        for index, shard in enumerate(shards):
            self._do(index, shard)

    def _do(self, index: int, shard: Shard) -> None:
        """Read a shard, unless that is of no use any more."""
        found: Recorded | None = None
        failure: BaseException | None = None
        try:
            self._go_on()
            found = shard.read(self._go_on)
        except BaseException as error:
            failure = _without_frames(self._unread() if _exits() else error)  # a pool of threads refuses work then
        promise(-shard.nbytes, shard.device)
        with self._changed:
            left = self._left - 1
            if not left:  # before anybody knows of it: who has the last call may remove the folder
                self._folder.close()
            self._failure = self._failure or failure
            if self._failure is not None:
                self.read = {}
            elif found is not None:
                self.read[index] = found
            self._left = left
            self._changed.notify_all()

    def get(self, index: int) -> Recorded:
        while (found := self.read.get(index)) is None:
            self._wait(lambda: index in self.read)
        return found

    def wait(self) -> None:
        self._wait(lambda: False)

    def end(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._left)

    def _wait(self, enough: Callable[[], bool]) -> None:
        """Wait until enough is in, or all, or until one has failed and nobody reads in the folder any more."""
        if self._left and os.getpid() != self._process:
            raise SavedBaseError(
                f"{self._name} was still being read when this process was forked: call base.wait() before"
            )
        if self._left:
            with self._changed:
                self._changed.wait_for(lambda: not self._left or (self._failure is None and enough()))
        if self._failure is not None:
            raise copy.copy(self._failure)

    def _go_on(self) -> None:
        if self._stopped or self._failure is not None or _exits():
            raise self._unread()

    def _unread(self) -> SavedBaseError:
        return SavedBaseError(f"{self._name} was not read to its end, because the interpreter exits: load it again")


def _exits() -> bool:
    """Whether the interpreter exits: its main thread ends before those are waited for that read."""
    return not threading.main_thread().is_alive()


def _without_frames(error: BaseException) -> BaseException:
    """An error that keeps no memory alive which its frames hold; one that ought not to be is logged with them."""
    if not isinstance(error, FiseditError):
        logger.error("a base could not be read", exc_info=error)
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)
