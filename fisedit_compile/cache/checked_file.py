"""A file of a saved base: a regular one of a known size, which threads read at any place."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from fisedit_compile.cache.base_manifest import WHAT_TO_DO
from fisedit_compile.errors import BaseStorageError, DamagedBaseError

#: Pieces of memory that the kernel fills in one call at most (IOV_MAX of Linux).
_MOST_PIECES = 1024


class CheckedFile:
    """A file in an open folder. A context manager, which closes it; any number of threads may read within it.

    Args:
        folder: of the base, for messages.
        descriptor: of the open folder.
        name: of the file.
        size: that it has to have, in bytes; None for any.

    Attributes:
        size: in bytes.

    Raises:
        FileNotFoundError: there is none.
        DamagedBaseError: no regular file, or of another size; nothing was allocated for it.
        BaseStorageError: it cannot be read.
    """

    def __init__(self, folder: Path, descriptor: int, name: str, size: int | None = None) -> None:
        self._folder, self._name = folder, name
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._descriptor = os.open(name, flags, dir_fd=descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:  # a link, for one
            check_status(folder, name, os.stat(name, dir_fd=descriptor, follow_symlinks=False), size)
            raise self._unreadable(error) from error
        try:
            status = os.fstat(self._descriptor)
            check_status(folder, name, status, size)
        except BaseException:
            os.close(self._descriptor)
            raise
        self.size = status.st_size

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        os.close(self._descriptor)

    def fill(self, start: int, memories: Sequence[memoryview]) -> None:
        """Read from a place on straight into some pieces of memory, one behind the other; other threads run meanwhile.

        Raises:
            DamagedBaseError: the file ends before.
            BaseStorageError: it cannot be read.
        """
        rest = [memory for memory in memories if memory]
        while rest:
            try:
                count = os.preadv(self._descriptor, rest[:_MOST_PIECES], start)
            except OSError as error:
                raise self._unreadable(error) from error
            if not count:
                raise damaged(self._folder, self._name, "was cut short while it was read")
            start += count
            while rest and count >= len(rest[0]):
                count -= len(rest.pop(0))
            if count:
                rest[0] = rest[0][count:]

    def content(self) -> bytearray:
        """All of it, for files that are small.

        Raises:
            DamagedBaseError, BaseStorageError: see :meth:`fill`.
        """
        data = bytearray(self.size)
        self.fill(0, [memoryview(data)])
        return data

    def check(self, checksum: str, expected: str) -> None:
        """Hold the checksum of what was read to the one that was written.

        Raises:
            DamagedBaseError: it is another one.
        """
        if checksum != expected:
            raise damaged(self._folder, self._name, "is not what was written")

    def _unreadable(self, error: OSError) -> BaseStorageError:
        return BaseStorageError(f"{self._folder / self._name} cannot be read ({error.strerror})")


def check_status(folder: Path, name: str, status: os.stat_result, size: int | None) -> None:
    """Hold what lies in a base's folder to a regular file of a size, in bytes; None for any.

    Raises:
        DamagedBaseError: it is none.
    """
    if stat.S_ISLNK(status.st_mode):
        raise damaged(folder, name, "is a symbolic link")
    if not stat.S_ISREG(status.st_mode):
        raise damaged(folder, name, "is no regular file")
    if size is not None and status.st_size != size:
        raise damaged(folder, name, f"has {status.st_size} bytes instead of {size}")


def damaged(folder: Path, name: str, how: str) -> DamagedBaseError:
    """The error for a file of a base."""
    return DamagedBaseError(f"{folder}: {name} {how}: {WHAT_TO_DO}")
