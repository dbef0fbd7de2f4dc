"""Locks on folders: who reads a base shares its folder's lock, who writes or removes one has it alone.

They are the kernel's (``flock``), on the folder itself: they end with the process that holds them however it ends, move
with a folder that is renamed, and hold between processes and between threads alike.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fisedit_compile.errors import BaseFormatError, BaseInUseError, BaseStorageError


@contextmanager
def folder_lock(folder: Path, *, alone: bool, follow: bool = False) -> Iterator[int]:
    """Within the context the folder's lock is held; gives a file descriptor of the folder.

    Args:
        folder: that is locked.
        alone: nobody else may hold the lock, which is not waited for; otherwise nobody else may hold it alone, which is
            waited for, since it takes moments: until a folder has its name, or has lost it.
        follow: whether ``folder`` may be a symbolic link to the folder.

    Raises:
        BaseFormatError: there is no such folder, or no longer.
        BaseInUseError: somebody else holds the lock that is wanted alone.
        BaseStorageError: the folder cannot be read.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise BaseFormatError(
                f"{folder} is no folder of a saved base: give one that base.save(...) wrote"
            ) from None
        raise BaseStorageError(f"{folder} cannot be read ({error.strerror}): check its permissions") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if alone else fcntl.LOCK_SH)
        except BlockingIOError:
            raise BaseInUseError(f"{folder} is in use: try again when that has ended") from None
        if not _is_at(descriptor, folder, follow=follow):
            raise BaseFormatError(f"{folder} was removed just now: generate the base again")
        yield descriptor
    finally:
        os.close(descriptor)


def _is_at(descriptor: int, folder: Path, *, follow: bool) -> bool:
    """Whether the folder of an open descriptor is the one that lies at a path."""
    try:
        there = os.stat(folder, follow_symlinks=follow)
    except OSError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))
