"""The bases that a process works on: those used last stay in memory, all of them go to the store."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from fisedit_compile.cache.store import BaseStore
from fisedit_compile.errors import (
    BaseFormatError,
    BaseInUseError,
    BaseMismatchError,
    DamagedBaseError,
    FiseditError,
    SavedBaseError,
)
from fisedit_compile.serving.library import Library
from fisedit_compile.serving.picture import BasePlace
from fisedit_compile.serving.picture_id import is_picture_id

if TYPE_CHECKING:
    from fisedit_compile.editing.base import Base
    from fisedit_compile.editing.editor import Editor

logger = logging.getLogger(__name__)

#: Bases that wait to be written, with the one that is, and cannot leave the memory before. Where more are drawn than
#: the disk takes, the others are written when their turn comes, if they are still in memory then: nobody waits for the
#: disk, and a base that is gone can be drawn again.
_MOST_WAITING = 4

#: Seconds behind the last picture in which nothing is written: its answer is being sent, and the next request may come.
_MOMENT = 0.1

#: Pictures that are kept, of those without a base.
MOST_PICTURES = 20_000


class HeldBases:
    """Bases by the names of their pictures.

    A base is written behind the answer, by a thread of its own, and where that takes as long as drawing while nobody
    waits for a picture. What is in the store is noted in the library whenever it changes, and what somebody
    evicted with it; so is a base that leaves the memory without having been written.

    Args:
        editor: that drew them, or can load them.
        store: where they lie.
        library: of their pictures.
        max_bytes: that those in memory may take together; the one in use stays.
        write: whether bases are written at all.
        patience: seconds that a base waits for moments in which nobody waits for a picture, before it is written beside
            those that are drawn.

    Attributes:
        quiet: set while nobody waits for a picture; whoever draws clears it.
    """

    def __init__(
        self,
        editor: Editor,
        store: BaseStore,
        library: Library,
        max_bytes: int,
        *,
        write: bool = True,
        patience: float = 0.0,
    ) -> None:
        self._editor, self._store, self._library, self._max_bytes = editor, store, library, max_bytes
        self._write_at_all, self._patience = write, patience
        self.quiet = threading.Event()
        self.quiet.set()
        self._held: OrderedDict[str, Base] = OrderedDict()
        self._nbytes: dict[str, int] = {}  # of those, counted once: a base has thousands of tensors
        self._waiting: OrderedDict[str, Future[None]] = OrderedDict()
        self._later: OrderedDict[str, Base] = OrderedDict()  # in memory, to be written behind those that wait
        self._lock = threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write-bases")

    def find(self, name: str) -> Base | None:
        """The base of a picture, from memory or else from the store; None where it is in neither."""
        with self._lock:
            if (base := self._held.get(name)) is not None:
                self._held.move_to_end(name)
                return base
        try:
            with self._store.get(name) as folder:
                base = self._editor.load(folder)
                base.wait()  # so that a damaged one is drawn again, before anybody edits it
        except DamagedBaseError as error:
            logger.warning("base %s is damaged, and removed: %s", name, error)
            with contextlib.suppress(SavedBaseError):  # somebody else met it, too
                self._store.remove(name)
            return None
        except (
            BaseFormatError,
            BaseMismatchError,
            BaseInUseError,
        ) as error:  # none, one of another model, one that goes
            logger.info("base %s is not in the store: %s", name, error)
            return None
        self.hold(name, base)
        return base

    def holds(self, name: str) -> bool:
        """Whether a base is in memory."""
        with self._lock:
            return name in self._held

    def add(self, name: str, base: Base) -> None:
        """Hold a base in memory, and write it to the store in the background."""
        self.hold(name, base)
        self.write(name, base)

    def hold(self, name: str, base: Base) -> None:
        """Hold a base in memory; those that were used longest ago leave it if they take too much with it."""
        nbytes = base.nbytes
        with self._lock:
            self._held[name], self._nbytes[name] = base, nbytes
            self._held.move_to_end(name)
            taken, gone = sum(self._nbytes.values()), []
            while taken > self._max_bytes and len(self._held) > 1:
                oldest, _ = self._held.popitem(last=False)
                taken -= self._nbytes.pop(oldest)
                self._later.pop(oldest, None)
                gone += [] if oldest in self._waiting else [oldest]
        for each in gone:
            self._library.note_base_gone(each)

    def write(self, name: str, base: Base) -> None:
        """Write a base to the store in the background; its picture is in the library."""
        with self._lock:
            if self._write_at_all:
                self._later[name] = base
            self._begin_writing()

    def drop(self, name: str | None = None) -> None:
        """Let go of a base in memory, or of all of them."""
        with self._lock:
            gone = [each for each in self._held if name in (None, each)]
            for each in gone:
                del self._held[each], self._nbytes[each]
                self._later.pop(each, None)
            gone = [each for each in gone if each not in self._waiting]
        for each in gone:
            self._library.note_base_gone(each)

    @property
    def nbytes(self) -> int:
        """What those in memory take."""
        with self._lock:
            return sum(self._nbytes.values())

    def wait(self) -> None:
        """Wait until the bases that were added so far are written, as far as they stay in memory."""
        while True:
            with self._lock:
                waiting = list(self._waiting.values())
            if not waiting:
                return
            for each in waiting:
                each.result()

    def close(self) -> None:
        """Wait until those that wait for the writer are written; others leave with the memory."""
        with self._lock:
            self._later.clear()
            self._write_at_all = False
        self._writer.shutdown()

    def _write(self, name: str, base: Base, patient_until: float) -> None:
        def give_way() -> None:
            while (left := patient_until - time.monotonic()) > 0 and not self.quiet.is_set():
                if self.quiet.wait(left):
                    time.sleep(min(_MOMENT, left))

        try:
            give_way()
            self._put(name, base, give_way)
        finally:
            with self._lock:
                self._waiting.pop(name, None)
                self._begin_writing()

    def _put(self, name: str, base: Base, give_way: Callable[[], None]) -> None:
        try:
            self._store.put(base, name, give_way=give_way)
        except (FiseditError, OSError) as error:
            # Its picture is answered all the same: whoever edits it later waits until its base is drawn again.
            if not (self._store.folder / name).exists():
                logger.warning("base %s could not be written: %s", name, error)
                self._library.note_base(name, BasePlace.NOWHERE)
        note_saved_bases(self._store, self._library)

    def _begin_writing(self) -> None:
        """Let bases wait for the writer in the order in which they came, as many as may; the lock is held."""
        while self._later and len(self._waiting) < _MOST_WAITING:
            name, base = self._later.popitem(last=False)
            until = time.monotonic() + self._patience
            self._waiting[name] = self._writer.submit(self._write, name, base, until)


def note_saved_bases(store: BaseStore, library: Library, *, held: bool = True) -> None:
    """Hold library and store to each other: what was evicted is noted, and bases without a picture are removed.

    Args:
        store: the bases.
        library: the pictures.
        held: whether other processes may hold bases that they have not written yet; not when a service starts.
    """
    saved = {
        entry.name
        for entry in os.scandir(store.folder)
        if is_picture_id(entry.name) and entry.is_dir(follow_symlinks=False)
    }
    for name in library.note_saved(saved, held=held):
        try:
            store.remove(name)
        except BaseInUseError:  # the next look removes it
            continue
        except SavedBaseError as error:
            logger.warning("base %s has no picture, and could not be removed: %s", name, error)
    library.forget(MOST_PICTURES)


def open_store(folder: Path, max_bytes: int) -> BaseStore:
    """The bases of a service in its folder."""
    return BaseStore(folder / "bases", max_bytes)


def open_library(folder: Path, *, check: bool = False) -> Library:
    """The pictures of a service in its folder; see :class:`~fisedit_compile.serving.library.Library`."""
    folder.mkdir(parents=True, exist_ok=True)
    return Library(folder / "pictures.sqlite", check=check)
