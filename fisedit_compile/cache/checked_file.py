"""A file of a saved base as it is read: a regular one of a known size, whose checksum is taken on the way."""

from __future__ import annotations

import hashlib
import os
import stat
from io import FileIO
from pathlib import Path
from types import TracebackType

from fisedit_compile.cache.base_manifest import WHAT_TO_DO
from fisedit_compile.errors import BaseStorageError, DamagedBaseError


class CheckedFile:
    """A file in an open folder, read from its beginning to its end. A context manager, which closes it.

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
        self._folder, self._name, self._digest = folder, name, hashlib.blake2b(digest_size=16)
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._stream = FileIO(os.open(name, flags, dir_fd=descriptor))
        except FileNotFoundError:
            raise
        except OSError as error:  # a link, for one
            check_status(folder, name, os.stat(name, dir_fd=descriptor, follow_symlinks=False), size)
            raise self._unreadable(error) from error
        try:
            status = os.fstat(self._stream.fileno())
            check_status(folder, name, status, size)
        except BaseException:
            self._stream.close()
            raise
        self.size = status.st_size

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stream.close()

    def fill(self, memory: memoryview) -> None:
        """Read as many bytes as ``memory`` has, straight into it; other threads run meanwhile.

        Raises:
            DamagedBaseError: the file ends before.
            BaseStorageError: it cannot be read.
        """
        rest = memory
        while rest:
            try:
                count = self._stream.readinto(rest)
            except OSError as error:
                raise self._unreadable(error) from error
            if not count:
                raise damaged(self._folder, self._name, "was cut short while it was read")
            rest = rest[count:]
        self._digest.update(memory)

    def check(self, blake2b: str) -> None:
        """Hold all that was read to a checksum.

        Raises:
            DamagedBaseError: it has another one.
        """
        if self._digest.hexdigest() != blake2b:
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
