"""Writes a base into a folder: aside, to the disk, and renamed into place, so that there is a whole base or none.

A base is written into a hidden folder beside its own. Files and folder are flushed to the disk before the folder gets
its name, which is one operation of the file system. What a killed process leaves is such a hidden folder, which nobody
takes for a base and which :func:`~fisedit_compile.cache.remove_base.remove_leftovers` removes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from fisedit_compile.cache.base_manifest import CONTENT, MANIFEST, MOST_JSON, PARTIAL, BaseFile, Manifest
from fisedit_compile.cache.folder_lock import folder_lock
from fisedit_compile.cache.packed_base import PackedBase
from fisedit_compile.cache.read_base import WORKERS, note_use
from fisedit_compile.cache.shard_file import shard_chunks
from fisedit_compile.errors import BaseFormatError, BaseInUseError, BaseStorageError, SavedBaseError


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
    check_target(folder)
    content = packed.content_json
    if len(content) > MOST_JSON:
        raise SavedBaseError(
            f"{folder}: beside its tensors the base holds {len(content) / 2**20:.1f} MiB, and {MOST_JSON / 2**20:.1f} "
            "are read back at most: give the pipeline tensors or arrays instead of long lists"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _check_room(packed.nbytes, folder)
        with _partial_folder(folder) as partial:
            manifest = _write_files(packed, content, partial, give_way)
            _put_in_place(partial, folder)
            return manifest
    except OSError as error:
        if isinstance(error, SavedBaseError):
            raise
        raise _storage_error(error, folder) from error


def _write_files(packed: PackedBase, content: bytes, partial: Path, give_way: Callable[[], None] | None) -> Manifest:
    """Write all files of a base into a folder, and to the disk."""

    def write_shard(name: str) -> BaseFile:
        return _write(partial / name, shard_chunks(packed.shards[name]), give_way)

    with ThreadPoolExecutor(WORKERS) as workers:
        files = list(workers.map(write_shard, packed.shards))
    files.append(_write(partial / CONTENT, [content]))
    manifest = Manifest(packed.summary, tuple(files))
    _write(partial / MANIFEST, [manifest.to_json()])
    note_use(partial)
    _flush(partial)
    return manifest


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


def _check_room(needed: int, folder: Path) -> None:
    free = shutil.disk_usage(folder.parent).free
    if needed > free:
        raise BaseStorageError(
            f"{folder}: the base takes {needed / 2**20:.1f} MiB, and {free / 2**20:.1f} MiB are free there: free some "
            "space, or give a folder elsewhere"
        )


def _write(path: Path, chunks: Iterable[bytes | memoryview], give_way: Callable[[], None] | None = None) -> BaseFile:
    digest, size = hashlib.blake2b(digest_size=16), 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            digest.update(chunk)
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            size += len(chunk)
            if give_way is not None:
                give_way()
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return BaseFile(path.name, size, digest.hexdigest())


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
