"""Reads the files of a saved base, each of them held to what the manifest says of it before anything is made of it."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fisedit_compile.cache.base_manifest import CONTENT, LENGTH, MANIFEST, MOST_JSON, BaseFile, Manifest
from fisedit_compile.cache.checked_file import CheckedFile, check_status, damaged
from fisedit_compile.cache.file_checksum import RANGE, FileChecksum, checksum, joined, of_range, ranges
from fisedit_compile.cache.folder_lock import folder_lock
from fisedit_compile.errors import BaseFormatError, DamagedBaseError

if TYPE_CHECKING:
    from fisedit_compile.cache.shard_file import Part

#: Files that are written or verified at once, and ranges of a shard that are read at once. Most of the time goes into
#: their checksums, at some 2 GB/s a processor.
WORKERS = max(4, min(8, os.cpu_count() or 4))


class ShardMemory(Protocol):
    """Where the tensors of a shard are read to; any number of threads may use it."""

    def part(self, start: int, end: int) -> AbstractContextManager[Sequence[memoryview]]:
        """The memory for some bytes of the tensors, which is filled within the context.

        Args:
            start, end: the first byte, and the one behind the last, counted from the first tensor's first.
        """
        ...


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
            file.check(checksum(data), about.checksum)
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

    def read_shard(self, name: str, receive: Callable[[list[Part]], ShardMemory]) -> None:
        """Read a shard into memory that is there already, :data:`WORKERS` ranges of it at once.

        Args:
            name: of the file.
            receive: gives the memory for all parts.

        Raises:
            DamagedBaseError: the file is missing, of another size, or not what was written. That is known behind the
                last range: what was read is of no use then.
        """
        from fisedit_compile.cache.shard_file import parts_of  # loads torch, which a list of bases does not need

        with self._file(name) as (about, file):
            head = bytearray(LENGTH + self._header_nbytes(name, file))
            file.fill(0, [memoryview(head)])
            try:
                memory = receive(parts_of(head[LENGTH:], file.size - len(head)))
            except ValueError as error:
                raise self.damaged(name, str(error)) from None

            def read(extent: tuple[int, int]) -> bytes:
                start, end = (max(each - len(head), 0) for each in extent)
                with memory.part(start, end) as pieces:
                    file.fill(len(head) + start, pieces)
                    return of_range([memoryview(head)[slice(*extent)], *pieces])

            with ThreadPoolExecutor(WORKERS, thread_name_prefix="read-shard") as threads:
                of_ranges = list(threads.map(read, ranges(file.size)))  # the first error cancels what was not begun
            file.check(joined(of_ranges), about.checksum)

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
        memory = memoryview(bytearray(min(file.bytes, RANGE)))
        with self._file(file.name) as (about, opened):
            so_far = FileChecksum()
            for start, end in ranges(file.bytes):
                opened.fill(start, [memory[: end - start]])
                so_far.update(memory[: end - start])
            opened.check(so_far.hexdigest(), about.checksum)

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
        return file.content()

    def _header_nbytes(self, name: str, file: CheckedFile) -> int:
        """How long the header of a shard is, which its first bytes say."""
        length = bytearray(min(file.size, LENGTH))
        file.fill(0, [memoryview(length)])
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
