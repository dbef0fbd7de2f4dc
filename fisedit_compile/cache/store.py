"""``BaseStore``: saved bases in one folder within a budget of bytes, shared by threads and processes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fisedit_compile.cache.base_manifest import MANIFEST, Manifest
from fisedit_compile.cache.read_base import open_base
from fisedit_compile.cache.remove_base import remove_base, remove_leftovers, why_kept
from fisedit_compile.errors import (
    BaseFormatError,
    BaseInUseError,
    BaseStorageError,
    BaseVersionError,
    SavedBaseError,
)

if TYPE_CHECKING:
    from fisedit_compile.cache.packed_base import PackedBase

#: Who changes what lies in a store holds this file's lock.
_LOCK = ".lock"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Savable(Protocol):
    """A :class:`~fisedit_compile.Base`."""

    def pack(self) -> PackedBase: ...


@dataclass(frozen=True)
class StoredBase:
    """A base that lies in a folder of bases.

    Attributes:
        name: of its folder.
        bytes: that its files take.
        used: when it was loaded last, or saved.
        manifest: what it says of itself; None where it cannot be read.
        problem: why it cannot be used; empty if nothing is known against it. Shards are not looked at.
    """

    name: str
    bytes: int
    used: datetime
    manifest: Manifest | None
    problem: str


@dataclass(frozen=True)
class _Known:
    """A base that was looked at, and which file its manifest was: a folder of its name may be another one later."""

    base: StoredBase
    manifest: tuple[int, int]

    @staticmethod
    def of(base: StoredBase, folder: Path) -> _Known:
        return _Known(base, _file(folder / base.name / MANIFEST))

    def is_at(self, path: Path) -> bool:
        return _file(path / MANIFEST) == self.manifest


def _file(path: Path) -> tuple[int, int]:
    """What tells a file from another one, and from itself before it was written to; zeros where there is none."""
    try:
        found = path.stat(follow_symlinks=False)
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


class BaseStore:
    """Saved bases in one folder, of which the least recently used go when there is no room for another.

    Several threads and processes may share the folder. A base that is put in is there whole or not at all, whenever its
    writer dies; one that is in use (:meth:`get`, ``Editor.load``) stays. What else lies in the folder is left alone.

    Args:
        folder: where the bases lie; it is made if it is not there.
        max_bytes: that all bases may take together, with what their manifests take.

    Raises:
        BaseStorageError: the folder cannot be made.
        ValueError: a budget of no bytes.
    """

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        if max_bytes < 1:
            raise ValueError(f"max_bytes={max_bytes}: give the bytes that bases may take together")
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._known: dict[str, _Known] = {}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BaseStorageError(f"{folder} cannot be a folder of bases ({error.strerror})") from error

    def put(self, base: Savable, name: str | None = None, *, give_way: Callable[[], None] | None = None) -> str:
        """Save a base, and let those go that were not used for longest if there is no room for it.

        Args:
            base: the base.
            name: letters, digits, ``.``, ``_`` and ``-``; None makes one up.
            give_way: called between two pieces that are written, by several threads, and may wait: until others have
                done what is more urgent.

        Returns:
            Its name.

        Raises:
            BaseInUseError: those that are in use leave no room for it.
            BaseStorageError: the file system is full, read-only or forbidden.
            SavedBaseError: there is a base of that name already; the base is larger than the budget, or cannot be kept.
            ValueError: such a name is not allowed.
        """
        from fisedit_compile.cache.write_base import check_target, write_base  # loads torch, which a list does not need

        folder = self._folder_of(secrets.token_hex(8) if name is None else name)
        packed = base.pack()
        if packed.nbytes > self.max_bytes:
            raise SavedBaseError(
                f"the base takes {_mib(packed.nbytes)}, and all bases in {self.folder} may take "
                f"{_mib(self.max_bytes)}: raise max_bytes, or generate it with fewer steps"
            )
        with self._alone():
            check_target(folder)
            remove_leftovers(self.folder)
            self._make_room(self.max_bytes - packed.nbytes)
            write_base(packed, folder, give_way)
        return folder.name

    @contextmanager
    def get(self, name: str) -> Iterator[Path]:
        """The folder of a base, for ``Editor.load``: within the context the base stays, and counts as used now.

        Raises:
            BaseFormatError: there is none of that name, or no longer.
            DamagedBaseError: its manifest is not what was written.
        """
        folder = self._folder_of(name)
        with open_base(folder, follow=False) as opened:
            opened.note_use()
            yield folder

    def bases(self) -> list[StoredBase]:
        """All bases, the least recently used first."""
        return stored_bases(self.folder)

    def evict(self, max_bytes: int | None = None) -> list[str]:
        """Remove what killed processes left, and the least recently used bases until the others fit.

        Args:
            max_bytes: that bases may take together; None is the store's own budget.

        Returns:
            The names of the bases that went.

        Raises:
            BaseInUseError: those that are in use do not fit.
        """
        with self._alone():
            remove_leftovers(self.folder)
            return self._make_room(self.max_bytes if max_bytes is None else max_bytes)

    def remove(self, name: str) -> None:
        """Remove a base.

        Raises:
            BaseFormatError: there is none of that name, or other files lie in its folder.
            BaseInUseError: it is in use.
        """
        with self._alone():
            remove_base(self._folder_of(name))

    def _make_room(self, most: int) -> list[str]:
        bases, going, why = self._looked_at(), [], ""
        taken = sum(base.bytes for base in bases)
        for base in bases:
            if taken <= most:
                break
            if kept := why_kept(self.folder / base.name):
                why = why or kept
            else:
                taken -= base.bytes
                going.append(base.name)
        if taken > most:
            raise BaseInUseError(
                f"{self.folder}: bases that have to stay take {_mib(taken)} of {_mib(most)} that are left for them, so "
                f"nothing was removed: {why}; or raise max_bytes"
            )
        for name in going:
            with contextlib.suppress(BaseFormatError):  # somebody removed it meanwhile, beside the store
                remove_base(self.folder / name)
        return going

    def _looked_at(self) -> list[StoredBase]:
        """:meth:`bases`, of which each is looked at once: a base stays as it was written."""
        bases = stored_bases(self.folder, self._known)
        self._known = {base.name: _Known.of(base, self.folder) for base in bases if not base.problem}
        return bases

    def _folder_of(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(f"name={name!r}: give letters, digits, '.', '_' and '-', the first no mark")
        return self.folder / name

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One after the other: whoever changes what lies in the store, in this process or another."""
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self.folder / _LOCK, flags, 0o666)
        except OSError as error:
            raise BaseStorageError(
                f"{self.folder} cannot be changed ({error.strerror}): check its permissions"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def stored_bases(folder: Path, known: Mapping[str, _Known] | None = None) -> list[StoredBase]:
    """The bases in a folder, the least recently used first; hidden folders, links and other things are none.

    Args:
        folder: the folder.
        known: bases that were looked at before: of these only their last use is looked at, as long as they are there.

    Raises:
        BaseStorageError: the folder cannot be read.
    """
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise BaseStorageError(f"{folder} cannot be read ({error.strerror}): give a folder of bases") from error
    found = []
    for name in names:
        try:
            base = _stored_base(folder / name, (known or {}).get(name))
        except OSError:  # removed meanwhile
            continue
        if base is not None:
            found.append(base)
    return sorted(found, key=lambda base: (base.used, base.name))


def _stored_base(path: Path, known: _Known | None) -> StoredBase | None:
    """What lies in a folder; None where that is no base."""
    if path.name.startswith(".") or path.is_symlink() or not (path / MANIFEST).is_file():
        return None
    used = datetime.fromtimestamp(path.stat().st_mtime_ns / 1e9, UTC)
    if known is not None and known.is_at(path):
        return replace(known.base, used=used)
    manifest, problem = None, ""
    try:
        with open_base(path, follow=False) as opened:
            manifest = opened.manifest
    except BaseVersionError as error:
        problem = str(error)
    except BaseFormatError:
        return None
    except SavedBaseError as error:
        problem = str(error)
    size = sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path))
    return StoredBase(path.name, size, used, manifest, problem)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
