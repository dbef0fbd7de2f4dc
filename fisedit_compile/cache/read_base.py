"""Reads the files of a saved base, each of them held to what the manifest says of it before anything is made of it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fisedit_compile.cache.base_manifest import CONTENT, LENGTH, MANIFEST, MOST_JSON, BaseFile, Manifest
from fisedit_compile.cache.checked_file import CheckedFile, check_status, damaged
from fisedit_compile.cache.folder_lock import folder_lock
from fisedit_compile.errors import BaseFormatError, DamagedBaseError

if TYPE_CHECKING:
    from fisedit_compile.cache.shard_file import Part

#: Files that are written or verified at once. Most of the time goes into their checksums, at some 1 GB/s a processor.
WORKERS = max(4, min(8, os.cpu_count() or 4))

#: Bytes that are read at once. Between two pieces a thread needs the interpreter's lock, for which it may have to wait.
PIECE = 4 * 2**20


class BaseFolder:
    """A saved base whose folder is open, and whose files are read by their names in it.

    Attributes:
        folder: where it lies.
        manifest: what the manifest says.
    """

    def __init__(self, folder: Path, descriptor: int) -> None:
        self.folder, self._descriptor = folder, descriptor
        try:
            with CheckedFile(folder, descriptor, MANIFEST) as file:
                data = self._json(MANIFEST, file)
        except FileNotFoundError:
            raise BaseFormatError(
                f"{folder} is no folder of a saved base (no {MANIFEST} in it): give one that base.save(...) wrote"
            ) from None
        self.manifest = Manifest.of_json(data, folder)
        self._files = {file.name: file for file in self.manifest.files}

    @contextmanager
    def again(self) -> Iterator[BaseFolder]:
        """The same folder for somebody else, locked for as long as either of the two contexts lasts."""
        other = copy.copy(self)
        other._descriptor = os.dup(self._descriptor)
        try:
            yield other
        finally:
            os.close(other._descriptor)

    def check_sizes(self) -> None:
        """Look at all files, without reading them.

        Raises:
            DamagedBaseError: one is missing, no regular file, or of another size than was written.
        """
        for file in self.manifest.files:
            try:
                status = os.stat(file.name, dir_fd=self._descriptor, follow_symlinks=False)
                check_status(self.folder, file.name, status, file.bytes)
            except FileNotFoundError:
                raise self.damaged(file.name, "is missing") from None

    def content(self) -> Any:
        """What ``base.json`` holds.

        Raises:
            DamagedBaseError: it is not what was written.
        """
        with self._file(CONTENT) as (about, file):
            data = self._json(CONTENT, file)
            file.check(about.blake2b)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise self.damaged(CONTENT, "is no JSON") from None

    def shard_nbytes(self, name: str) -> int:
        """Bytes of the tensors in a shard, of which no more is read than that.

        Raises:
            DamagedBaseError: the file is missing, of another size, or no shard.
        """
        with self._file(name) as (_, file):
            return file.size - LENGTH - self._header_nbytes(name, file)

    def read_shard(self, name: str, receive: Callable[[list[Part]], Iterable[memoryview]]) -> None:
        """Read a shard into memory that is there already.

        Args:
            name: of the file.
            receive: gives the memory for all parts in pieces, each of which is filled before the next is asked for.

        Raises:
            DamagedBaseError: the file is missing, of another size, or not what was written. That is known behind the
                last piece: what was read is of no use then.
        """
        from fisedit_compile.cache.shard_file import parts_of  # loads torch, which a list of bases does not need

        with self._file(name) as (about, file):
            header = bytearray(self._header_nbytes(name, file))
            file.fill(memoryview(header))
            try:
                parts = parts_of(header, file.size - LENGTH - len(header))
            except ValueError as error:
                raise self.damaged(name, str(error)) from None
            for piece in receive(parts):
                file.fill(piece)
            file.check(about.blake2b)

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
        """The error for a file of the base."""
        return damaged(self.folder, name, how)

    def _check(self, file: BaseFile) -> None:
        memory = memoryview(bytearray(min(file.bytes, PIECE)))
        with self._file(file.name) as (about, opened):
            for start in range(0, file.bytes, PIECE):
                opened.fill(memory[: min(PIECE, file.bytes - start)])
            opened.check(about.blake2b)

    @contextmanager
    def _file(self, name: str) -> Iterator[tuple[BaseFile, CheckedFile]]:
        """What the manifest says of a file, and the file."""
        if name not in self._files:
            raise self.damaged(MANIFEST, f"names no {name}")
        about = self._files[name]
        try:
            file = CheckedFile(self.folder, self._descriptor, name, about.bytes)
        except FileNotFoundError:
            raise self.damaged(name, "is missing") from None
        with file:
            yield about, file

    def _json(self, name: str, file: CheckedFile) -> bytearray:
        if file.size > MOST_JSON:
            raise self.damaged(name, f"has {file.size} bytes, more than a base's can have")
        data = bytearray(file.size)
        file.fill(memoryview(data))
        return data

    def _header_nbytes(self, name: str, file: CheckedFile) -> int:
        """How long the header of a shard is, which its first bytes say."""
        length = bytearray(min(file.size, LENGTH))
        file.fill(memoryview(length))
        count = int.from_bytes(length, "little")
        if count > min(MOST_JSON, file.size - LENGTH):
            raise self.damaged(name, f"no safetensors: a header of {count} bytes")
        return count


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
