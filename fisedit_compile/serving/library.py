"""The pictures of a service: one SQLite file, the truth about what was drawn, how, and which bases lie in the store.

Any number of processes share the file. Triggers write the name of each picture that changes into a list, by which
readers follow (:class:`~fisedit_compile.serving.request_index.RequestIndex`).
"""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fisedit_compile.serving.picture import BasePlace, Picture
from fisedit_compile.serving.requests import Settings

logger = logging.getLogger(__name__)

_VERSION = 1

_SCHEMA = f"""
CREATE TABLE pictures (
    id TEXT PRIMARY KEY, kind TEXT NOT NULL, prompt TEXT NOT NULL, key TEXT NOT NULL, pipeline TEXT NOT NULL,
    route TEXT NOT NULL, settings TEXT NOT NULL, seed INTEGER NOT NULL, parent TEXT, mask BLOB, embedding BLOB,
    encoder TEXT NOT NULL, png BLOB NOT NULL, pixels TEXT NOT NULL, seconds REAL NOT NULL, reuse TEXT NOT NULL,
    report TEXT NOT NULL, base INTEGER NOT NULL, created REAL NOT NULL
) STRICT;
CREATE INDEX exact ON pictures (key, prompt, created);
CREATE INDEX by_pixels ON pictures (pixels);
CREATE TABLE changes (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL) STRICT;
CREATE TRIGGER added AFTER INSERT ON pictures BEGIN INSERT INTO changes (id) VALUES (new.id); END;
CREATE TRIGGER changed AFTER UPDATE OF base ON pictures BEGIN INSERT INTO changes (id) VALUES (new.id); END;
CREATE TRIGGER removed AFTER DELETE ON pictures BEGIN INSERT INTO changes (id) VALUES (old.id); END;
PRAGMA user_version = {_VERSION};
"""


class Library:
    """The pictures in a file; threads and processes may share it.

    Args:
        path: of the file, which is made if it is not there. One that is no such file is put aside, and a new one made.
        check: look for damage in all of the file, which takes a second for each gigabyte or so.
    """

    def __init__(self, path: Path, *, check: bool = False) -> None:
        self._path, self._lock = path, threading.RLock()
        try:
            self._connection = self._open(check)
        except sqlite3.DatabaseError as error:
            if isinstance(
                error, sqlite3.OperationalError
            ):  # locked, read-only, no room: nothing is wrong with the file
                raise
            aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
            logger.warning("%s is damaged (%s): it is put aside as %s, and a new one begins", path, error, aside.name)
            for suffix in ("", "-wal", "-shm"):
                if (part := path.with_name(path.name + suffix)).exists():
                    os.replace(part, aside.with_name(aside.name + suffix))
            self._connection = self._open(check)

    def add(self, picture: Picture) -> None:
        """Write a picture; one of the same name stays as it is."""
        values = asdict(picture)
        values["settings"], values["reuse"], values["report"] = (
            json.dumps(values[name]) for name in ("settings", "reuse", "report")
        )
        if picture.embedding is not None:
            values["embedding"] = picture.embedding.astype("<f4").tobytes()
        columns = ", ".join(values)
        with self._changing() as connection:
            connection.execute(
                f"INSERT OR IGNORE INTO pictures ({columns}) VALUES ({', '.join('?' * len(values))})",
                tuple(values.values()),
            )

    def get(self, name: str) -> Picture | None:
        """The picture of that name."""
        return next(self._pictures("id = ?", name), None)

    def route_of(self, name: str) -> str | None:
        """The route of the picture of that name."""
        with self._lock:
            row = self._connection.execute("SELECT route FROM pictures WHERE id = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def exact(self, key: str, prompt: str, seed: int | None) -> Picture | None:
        """The picture that was drawn last for a key and prompt, by the service's own choice; None takes any seed."""
        found = self._pictures(
            "key = ? AND prompt = ? AND kind IN ('new', 'reused') AND seed = coalesce(?, seed)"
            " ORDER BY created DESC LIMIT 1",
            *(key, prompt, seed),
        )
        return next(found, None)

    def of_pixels(self, pixels: str, pipeline: str) -> Picture | None:
        """The last picture of those pixels that a pipeline can edit."""
        found = self._pictures("pixels = ? AND pipeline = ? ORDER BY created DESC LIMIT 1", pixels, pipeline)
        return next(found, None)

    def seconds_of_new(self, key: str) -> float | None:
        """What a new picture of a key takes: the median of the last ones."""
        with self._lock:
            rows = self._connection.execute(
                "SELECT seconds FROM pictures WHERE key = ? AND kind = 'new' ORDER BY created DESC LIMIT 9", (key,)
            ).fetchall()
        return float(np.median([seconds for (seconds,) in rows])) if rows else None

    def note_base(self, name: str, place: BasePlace) -> None:
        """Write where the base of a picture is."""
        with self._changing() as connection:
            connection.execute("UPDATE pictures SET base = ? WHERE id = ? AND base != ?", (place, name, place))

    def note_base_gone(self, name: str) -> None:
        """Write that nothing of a picture's base is in memory any more; one that is in the store is there."""
        with self._changing() as connection:
            connection.execute(
                f"UPDATE pictures SET base = {BasePlace.NOWHERE:d} WHERE id = ? AND base != {BasePlace.SAVED:d}",
                (name,),
            )

    def note_saved(self, saved: Iterable[str], *, held: bool) -> set[str]:
        """Hold what is written to what lies in the store.

        Args:
            saved: names of all bases in the store.
            held: whether bases may be in the memory of processes; if not, those that were are nowhere now.

        Returns:
            Those bases that no picture belongs to.
        """
        with self._changing() as connection:
            connection.execute("CREATE TEMP TABLE IF NOT EXISTS saved (id TEXT PRIMARY KEY) STRICT")
            connection.execute("DELETE FROM temp.saved")
            connection.executemany("INSERT INTO temp.saved VALUES (?)", ((name,) for name in saved))
            gone = f"{BasePlace.SAVED:d}" if held else f"{BasePlace.SAVED:d}, {BasePlace.HELD:d}, {BasePlace.EDIT:d}"
            connection.execute(
                f"UPDATE pictures SET base = {BasePlace.NOWHERE:d} WHERE base IN ({gone})"
                " AND id NOT IN (SELECT id FROM temp.saved)"
            )
            connection.execute(
                f"UPDATE pictures SET base = {BasePlace.SAVED:d} WHERE base != {BasePlace.SAVED:d}"
                " AND id IN (SELECT id FROM temp.saved)"
            )
            rows = connection.execute("SELECT id FROM temp.saved WHERE id NOT IN (SELECT id FROM pictures)")
            return {name for (name,) in rows}

    def remove(self, name: str) -> bool:
        """Remove a picture; whether there was one."""
        with self._changing() as connection:
            return connection.execute("DELETE FROM pictures WHERE id = ?", (name,)).rowcount > 0

    def changes_since(self, number: int) -> tuple[int, set[str]]:
        """The number of the last change, and the names of the pictures that changed behind ``number``."""
        with self._lock:
            rows = self._connection.execute("SELECT number, id FROM changes WHERE number > ?", (number,)).fetchall()
        return max((last for last, _ in rows), default=number), {name for _, name in rows}

    def searchable(self, names: Iterable[str]) -> Iterator[tuple[str, str, str, int, np.ndarray, BasePlace]]:
        """Name, key, encoder, seed, embedding and place of the base of those pictures that can be changed."""
        with self._lock:
            for name in names:
                row = self._connection.execute(
                    "SELECT id, key, encoder, seed, embedding, base FROM pictures"
                    f" WHERE id = ? AND kind IN ('new', 'reused') AND base != {BasePlace.NOWHERE:d}"
                    " AND embedding IS NOT NULL",
                    (name,),
                ).fetchone()
                if row is not None:
                    yield *row[:4], np.frombuffer(row[4], "<f4"), BasePlace(row[5])

    def forget(self, most: int) -> None:
        """Remove the oldest pictures that have no base until ``most`` are left, or all others have one."""
        with self._changing() as connection:
            connection.execute(
                f"DELETE FROM pictures WHERE id IN (SELECT id FROM pictures WHERE base = {BasePlace.NOWHERE:d}"
                " ORDER BY created LIMIT max(0, (SELECT count(*) FROM pictures) - ?))",
                (most,),
            )

    def count(self) -> int:
        """How many pictures there are."""
        with self._lock:
            return int(self._connection.execute("SELECT count(*) FROM pictures").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    def _pictures(self, where: str, *values: Any) -> Iterator[Picture]:
        with self._lock:
            cursor = self._connection.execute(f"SELECT * FROM pictures WHERE {where}", values)
            names = [column for column, *_ in cursor.description]
            rows = cursor.fetchall()
        for row in rows:
            values_of = dict(zip(names, row, strict=True))
            for name in ("settings", "reuse", "report"):
                values_of[name] = json.loads(values_of[name])
            values_of["settings"] = Settings(**values_of["settings"])
            if values_of["embedding"] is not None:
                values_of["embedding"] = np.frombuffer(values_of["embedding"], "<f4")
            yield Picture(**{**values_of, "base": BasePlace(values_of["base"])})

    def _open(self, check: bool) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=30, isolation_level=None, check_same_thread=False)
        try:
            # A killed process loses nothing that it was told is written; a power cut may lose the last pictures.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if not version:
                for statement in _statements(_SCHEMA):
                    connection.execute(statement)
            elif version != _VERSION:
                raise sqlite3.DatabaseError(f"format {version}, this version reads {_VERSION}")
            if check and connection.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("its check fails")
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def _changing(self) -> Iterator[sqlite3.Connection]:
        """A transaction, whole or not at all."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
