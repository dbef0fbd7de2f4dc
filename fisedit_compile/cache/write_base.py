"""Writes a base into a folder: aside, to the disk, and renamed into place, so that there is a whole base or none.

A base is written into a hidden folder beside its own. Files and folder are flushed to the disk before the folder gets
its name, which is one operation of the file system. What a killed process leaves is such a hidden folder, which nobody
takes for a base and which :func:`~fisedit_compile.cache.remove_base.remove_leftovers` removes.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from fisedit_compile.cache.base_manifest import CONTENT, MANIFEST, MOST_JSON, PARTIAL, BaseFile, Manifest
from fisedit_compile.cache.file_checksum import FileChecksum
from fisedit_compile.cache.folder_lock import folder_lock
from fisedit_compile.cache.packed_base import PackedBase
from fisedit_compile.cache.read_base import WORKERS, note_use
from fisedit_compile.cache.shard_file import shard_chunks
from fisedit_compile.errors import BaseFormatError, BaseInUseError, BaseStorageError, SavedBaseError


class BaseWriter:
    """Writes the files of one base into a folder aside, some of them before the others are known. Made by
    :func:`base_writer`.

    Args:
        folder: where the base will lie.
        partial: the folder aside.
        give_way: see :func:`write_base`.
    """

    def __init__(self, folder: Path, partial: Path, give_way: Callable[[], None] | None) -> None:
        self._folder, self._partial, self._give_way = folder, partial, give_way
        self._threads = ThreadPoolExecutor(WORKERS, thread_name_prefix="write-base")
        self._shards: dict[str, Future[BaseFile]] = {}

    def begin_shard(self, name: str, tensors: Mapping[str, Tensor]) -> Future[BaseFile]:
        """Write a shard in the background.

        Args:
            name: of its file.
            tensors: of the shard; those on a GPU are read behind what was launched so far on its current stream.

        Returns:
            Its file, or the :class:`~fisedit_compile.BaseStorageError` that says why it is not written.
        """
        device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
        made = None if device is None else torch.cuda.current_stream(device).record_event()
        future = self._shards[name] = self._threads.submit(self._write_shard, name, tensors, made)
        return future

    def check_room(self, nbytes: int) -> None:
        """Hold what will be written to what is free.

        Raises:
            BaseStorageError: there is less.
        """
        with _named(self._folder):
            free = shutil.disk_usage(self._folder.parent).free
        if nbytes > free:
            raise BaseStorageError(
                f"{self._folder}: the base takes {nbytes / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free there: "
                "free some space, or give a folder elsewhere"
            )

    def finish(self, packed: PackedBase) -> Manifest:
        """Write what is not written yet, and give the folder its name.

        Args:
            packed: the base, whose other shards were begun before.

        Raises:
            SavedBaseError: the base holds too much beside its tensors.
            BaseStorageError: see :func:`write_base`.
        """
        content = packed.content_json
        if len(content) > MOST_JSON:
            raise SavedBaseError(
                f"{self._folder}: beside its tensors the base holds {len(content) / 2**20:.1f} MiB, and "
                f"{MOST_JSON / 2**20:.1f} are read back at most: give the pipeline tensors or arrays instead of long "
                "lists"
            )
        self.check_room(packed.nbytes)
        for name, tensors in packed.shards.items():
            self.begin_shard(name, tensors)
        files = [shard.result() for shard in self._shards.values()]
        with _named(self._folder):
            files.append(_write(self._partial / CONTENT, [content]))
            manifest = Manifest(packed.summary, tuple(files))
            _write(self._partial / MANIFEST, [manifest.to_json()])
            note_use(self._partial)
            _flush(self._partial)
            _put_in_place(self._partial, self._folder)
        return manifest

    def stop(self) -> None:
        """Begin with no shard more, and wait for those that are being written."""
        self._threads.shutdown(cancel_futures=True)

    def _write_shard(self, name: str, tensors: Mapping[str, Tensor], made: torch.cuda.Event | None) -> BaseFile:
        if made is not None:
            made.synchronize()
        with _named(self._folder):
            return _write(self._partial / name, shard_chunks(tensors), self._give_way)


@contextmanager
def base_writer(folder: Path, give_way: Callable[[], None] | None = None) -> Iterator[BaseWriter]:
    """What writes a base; nothing is left of it unless it was finished within the context.

    Args:
        folder, give_way: see :func:`write_base`.

    Raises:
        SavedBaseError, BaseStorageError: see :func:`write_base`.
    """
    check_target(folder)
    with contextlib.ExitStack() as stack:
        with _named(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            partial = stack.enter_context(_partial_folder(folder))
        writer = BaseWriter(folder, partial, give_way)
        stack.callback(writer.stop)
        yield writer


def write_base(packed: PackedBase, folder: Path, give_way: Callable[[], None] | None = None) -> Manifest:
    """Write a base, whole or not at all.

    Args:
        packed: the base.
        folder: where it will lie: one that is not there yet, or empty; those above it are made.
        give_way: called between two pieces, by several threads, and may wait.

    Raises:
        SavedBaseError: something lies there already, or the base holds too much beside its tensors.
        BaseStorageError: the file system is full, read-only or forbidden; nothing is left of what was written.
    """
    with base_writer(folder, give_way) as writer:
        return writer.finish(packed)


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Within the context the file system's errors are those of a base that was to lie in ``folder``."""
    try:
        yield
    except SavedBaseError:
        raise
    except OSError as error:
        raise _storage_error(error, folder) from error


def _put_in_place(partial: Path, folder: Path) -> None:
    """Give a folder that was written its name; an empty folder of that name gives way."""
    try:
        os.rename(partial, folder)
    except OSError:
        check_target(folder)  # somebody else was faster
        raise
    _flush(folder.parent)


def _storage_error(error: OSError, folder: Path) -> BaseStorageError:
    """What the file system says of a base that could not be written."""
    return BaseStorageError(
        f"{folder} could not be written ({error.strerror or error}), and nothing is left of it: free space or check "
        "the permissions, or give another folder"
    )


@contextmanager
def _partial_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside ``folder``, locked as long as this process writes it; gone afterwards unless renamed."""
    while True:
        partial = folder.parent / f".{folder.name}.{secrets.token_hex(4)}{PARTIAL}"
        partial.mkdir()
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(folder_lock(partial, alone=True))
            except (BaseFormatError, BaseInUseError):  # taken for a leftover before it was locked
                continue
            try:
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return


def check_target(folder: Path) -> None:
    """Whether a base may be written to a folder, asked before it is generated.

    Raises:
        SavedBaseError: something lies there already.
        BaseStorageError: what lies there cannot be seen.
    """
    try:
        taken = os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()))
    except OSError as error:
        raise _storage_error(error, folder) from error
    if taken:
        raise SavedBaseError(f"{folder} is there already: give another name, or remove it first")


def _write(path: Path, chunks: Iterable[bytes | memoryview], give_way: Callable[[], None] | None = None) -> BaseFile:
    checksum, size = FileChecksum(), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            checksum.update(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            size += len(chunk)
            if give_way is not None:
                give_way()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return BaseFile(path.name, size, checksum.hexdigest())


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
