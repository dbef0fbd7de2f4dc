"""Reads the files of a saved base, each of them held to what the manifest says of it before anything is made of it."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fisedit_compile.cache.base_manifest import (
    CONTENT,
    MANIFEST,
    MOST_JSON,
    WHAT_TO_DO,
    BaseFile,
    Manifest,
    checksum,
)
from fisedit_compile.cache.folder_lock import folder_lock
from fisedit_compile.errors import BaseFormatError, BaseStorageError, DamagedBaseError

#: Shards that are read or written at once. Most of the time goes into their checksums, at some 1 GB/s a processor.
WORKERS = max(4, min(8, os.cpu_count() or 4))


class BaseFolder:
    """A saved base whose folder is open, and whose files are read by their names in it.

    Attributes:
        folder: where it lies.
        manifest: what the manifest says.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder, self._descriptor = folder, descriptor
        try:
            data = self._read(MANIFEST, most=MOST_JSON)
        except FileNotFoundError:
            raise BaseFormatError(
                f"{folder} is no folder of a saved base (no {MANIFEST} in it): give one that base.save(...) wrote"
            ) from None
        self.manifest = Manifest.of_json(data, folder)
        self._files = {file.name: file for file in self.manifest.files}

    def check_sizes(self) -> None:
        """Look at all files, without reading them.

        Raises:
            DamagedBaseError: one is missing, no regular file, or of another size than was written.
        """
        for file in self.manifest.files:
            try:
                self._check_status(
                    file.name, os.stat(file.name, dir_fd=self._descriptor, follow_symlinks=False), file.bytes
                )
            except FileNotFoundError:
                raise self.damaged(file.name, "is missing") from None

    def content(self) -> Any:
        """What ``base.json`` holds.

        Raises:
            DamagedBaseError: it is not what was written.
        """
        try:
            return json.loads(self.read(CONTENT, most=MOST_JSON))
        except (ValueError, RecursionError):
            raise self.damaged(CONTENT, "is no JSON") from None

    def read(self, name: str, *, most: int | None = None) -> bytes:
        """The content of a file that the manifest names, which may be held to ``most`` bytes.

        Raises:
            DamagedBaseError: the file is missing, of another size, or not what was written.
        """
        if name not in self._files:
            raise self.damaged(MANIFEST, f"names no {name}")
        file = self._files[name]
        try:
            data = self._read(name, size=file.bytes, most=most)
        except FileNotFoundError:
            raise self.damaged(name, "is missing") from None
        if checksum(data) != file.blake2b:
            raise self.damaged(name, "is not what was written")
        return data

    def verify(self) -> None:
        """Read all files.

        Raises:
            DamagedBaseError: one is not what was written.
        """
        with ThreadPoolExecutor(WORKERS) as workers:
            for _ in workers.map(self._check, self.manifest.files):
                pass
        self.content()

    def foreign_files(self) -> list[str]:
        """Names of what lies in the folder and is no file of the base: it is neither read nor removed."""
        return sorted(name for name in os.listdir(self._descriptor) if name != MANIFEST and name not in self._files)

    def note_use(self) -> None:
        """Let the folder's time say that the base was used now; where that is forbidden, it stays as it was."""
        with contextlib.suppress(OSError):
            note_use(self._descriptor)

    def damaged(self, name: str, how: str) -> DamagedBaseError:
        return DamagedBaseError(f"{self.folder}: {name} {how}: {WHAT_TO_DO}")

    def _check(self, file: BaseFile) -> None:
        self.read(file.name)

    def _check_status(self, name: str, status: os.stat_result, size: int | None) -> None:
        if stat.S_ISLNK(status.st_mode):
            raise self.damaged(name, "is a symbolic link")
        if not stat.S_ISREG(status.st_mode):
            raise self.damaged(name, "is no regular file")
        if size is not None and status.st_size != size:
            raise self.damaged(name, f"has {status.st_size} bytes instead of {size}")

    def _read(self, name: str, *, size: int | None = None, most: int | None = None) -> bytes:
        """A file's content; nothing is allocated for it before it is known to be a file of that size."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            descriptor = os.open(name, flags, dir_fd=self._descriptor)
        except FileNotFoundError:
            raise
        except OSError as error:
            self._check_status(name, os.stat(name, dir_fd=self._descriptor, follow_symlinks=False), size)
            raise BaseStorageError(f"{self.folder / name} cannot be read ({error.strerror})") from error
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            self._check_status(name, status, size)
            if most is not None and status.st_size > most:
                raise self.damaged(name, f"has {status.st_size} bytes, more than a base's can have")
            try:
                return file.read(status.st_size)  # one large read, which maps no pages
            except OSError as error:
                raise BaseStorageError(f"{self.folder / name} cannot be read ({error.strerror})") from error


def note_use(folder: Path | int) -> None:
    """Let a folder's time be now, by the same clock for all: what the kernel notes itself is some milliseconds old."""
    now = time.time_ns()
    os.utime(folder, ns=(now, now))


@contextmanager
def open_base(folder: Path, *, follow: bool = True) -> Iterator[BaseFolder]:
    """A saved base, which nobody removes within the context.

    Args:
        folder: of the base.
        follow: whether it may be a symbolic link to the folder; its files may never be.

    Raises:
        BaseFormatError: no base, or one of another format.
        DamagedBaseError: its manifest is not what was written.
        BaseStorageError: it cannot be read.
    """
    with folder_lock(folder, alone=False, follow=follow) as descriptor:
        yield BaseFolder(folder, descriptor)
