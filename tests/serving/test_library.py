"""The pictures' file and the index over it, alone and against the store, whatever happens to either."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.shared_library import ENCODER, KEY, SIZE, Small, embedding, picture

from fisedit_compile.serving import held_bases, search
from fisedit_compile.serving.held_bases import HeldBases, note_saved_bases, open_library, open_store
from fisedit_compile.serving.library import Library
from fisedit_compile.serving.picture import BasePlace
from fisedit_compile.serving.picture_id import is_picture_id, new_picture_id
from fisedit_compile.serving.request_index import RequestIndex
from fisedit_compile.serving.search import Embeddings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return open_library(tmp_path)


class TestNames:
    def test_made_ones(self) -> None:
        names = {new_picture_id() for _ in range(1000)}
        assert len(names) == 1000
        assert all(is_picture_id(name) for name in names)

    @pytest.mark.parametrize(
        "name", ["", "p", "../p", "p" + 21 * "x" + "/", "p" + 23 * "x", "q" + 22 * "x", "p" + 22 * "é"]
    )
    def test_others(self, name: str) -> None:
        assert not is_picture_id(name)
        assert not is_picture_id(name + "\n")


class TestEmbeddings:
    @given(
        st.lists(st.tuples(st.integers(0, 20), st.booleans(), st.booleans()), max_size=200),
        st.one_of(st.none(), st.integers(0, 2)),
        st.sampled_from([-1.0, 0.2, 0.5, 2.0]),
        st.sampled_from([1, 3]),
    )
    def test_finds_what_a_search_of_all_finds(
        self, changes: list[tuple[int, bool, bool]], seed: int | None, enough: float, seeds: int
    ) -> None:
        embeddings, want = Embeddings(16), dict[str, tuple[np.ndarray, bool]]()
        for number, put, quick in changes:
            name = f"name-{number:08d}"
            if put:
                embeddings.put(name, number % seeds, embedding(name), quick=quick)
                want[name] = embedding(name), quick
            else:
                embeddings.drop(name)
                want.pop(name, None)
        query = embedding("a query ")
        cosines = {n: float(e @ query) for n, (e, _) in want.items() if seed in (None, int(n[-8:]) % seeds)}
        assert len(embeddings) == len(want)
        found = embeddings.nearest(query, seed, enough)
        if not cosines:
            assert found is None
            return
        assert found is not None
        assert found[1] == pytest.approx(cosines[found[0]], abs=1e-6)
        similar = [name for name, cosine in cosines.items() if cosine >= enough]
        best = [name for name in similar if want[name][1]] or similar
        if best:
            assert found[0] == max(best, key=lambda name: cosines[name])

    @pytest.mark.parametrize("common", [0.0, 0.8], ids=["spread", "alike"])
    def test_two_passes_find_what_one_finds(self, monkeypatch: pytest.MonkeyPatch, common: float) -> None:
        """Whether an embedding is similar enough, and which is the most similar one, is as by a product of all rows."""
        chance, width = np.random.default_rng(0), 160
        monkeypatch.setattr(search, "_FEW", 100)
        rows = chance.standard_normal((3000, width), np.float32) / np.arange(1, width + 1)
        rows[:, -1] += common * np.linalg.norm(rows, axis=1).mean() * 2
        rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
        embeddings = Embeddings(width)
        for i, row in enumerate(rows):
            embeddings.put(str(i), i, rows[i - 1] if i % 7 == 0 else row, quick=i % 3 > 0)
            if i == 1500:
                embeddings.nearest(row, None, 0.9)  # the directions are those of a part
        stored = np.array([rows[i - 1] if i % 7 == 0 else rows[i] for i in range(len(rows))])
        for i in range(0, 900, 2):
            embeddings.drop(str(i))
            stored[i] = 0
        quick = np.arange(len(rows)) % 3 > 0
        for i in range(200):
            query = rows[i] + np.float32(0.1 * i / 200) * chance.standard_normal(width, np.float32)
            query /= np.linalg.norm(query)
            cosines = stored @ query
            for enough in (0.9, 0.99, float(cosines.max()) - 1e-4, float(cosines.max()) + 1e-4):
                name, cosine = embeddings.nearest(query, None, enough)
                assert cosine == pytest.approx(cosines[int(name)], abs=1e-5)
                among = (cosines >= enough) & quick if ((cosines >= enough) & quick).any() else cosines >= enough
                if among.any():
                    assert cosine == pytest.approx(cosines[among].max(), abs=1e-5)
                else:
                    assert cosine < enough

    def test_grows(self) -> None:
        embeddings = Embeddings(16)
        for i in range(500):
            embeddings.put(f"name-{i:08d}", i, embedding(f"name-{i:08d}"))
        assert all(
            embeddings.nearest(embedding(f"name-{i:08d}"), i, 0.9)[0] == f"name-{i:08d}" for i in range(0, 500, 7)
        )


class TestLibrary:
    def test_gives_what_it_was_given(self, library: Library, tmp_path: Path) -> None:
        made = picture(mask=b"mask", parent="another", report={"a": [1, None]}, seed=2**63 - 1)
        library.add(made)
        for each in (library, open_library(tmp_path)):
            got = each.get(made.id)
            assert got is not None
            assert np.array_equal(got.embedding, made.embedding)
            assert {**vars(got), "embedding": None} == {**vars(made), "embedding": None}

    def test_the_first_of_a_name_stays(self, library: Library) -> None:
        made = picture()
        library.add(made)
        library.add(picture(made.id, prompt="other words"))
        assert library.get(made.id).prompt == made.prompt

    def test_another_format_and_a_damaged_file_are_put_aside(
        self, library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        made = picture()
        library.add(made)
        library.close()
        path = tmp_path / "pictures.sqlite"
        data = bytearray(path.read_bytes())
        data[4096:] = b"\xff" * (len(data) - 4096)
        path.write_bytes(data)
        for _ in ("damaged", "format 99"):
            again = open_library(tmp_path, check=True)
            assert again.get(made.id) is None
            again.add(made)
            again._connection.execute("PRAGMA user_version = 99")
            again.close()
            assert "put aside" in caplog.text
        assert len(list(tmp_path.glob("pictures.sqlite.damaged-*"))) == 2

    def test_a_file_that_another_process_has_locked_stays(self, library: Library, tmp_path: Path) -> None:
        made = picture()
        library.add(made)
        other = sqlite3.connect(tmp_path / "pictures.sqlite", isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        assert library.get(made.id) is not None  # readers do not wait
        other.execute("ROLLBACK")
        assert open_library(tmp_path).get(made.id) is not None

    def test_the_oldest_without_a_base_are_forgotten(self, library: Library) -> None:
        names = []
        for i in range(6):
            made = picture(created=float(i), base=BasePlace.NOWHERE if i % 2 else BasePlace.SAVED)
            library.add(made)
            names.append(made.id)
        library.forget(5)
        assert [library.get(name) is None for name in names] == [False, True, False, False, False, False]
        library.forget(0)
        assert [library.get(name) is None for name in names] == [False, True] * 3


class TestIndex:
    def test_follows_every_change_of_any_process(self, library: Library, tmp_path: Path) -> None:
        index, other = RequestIndex(library, ENCODER), open_library(tmp_path)

        def found(name: str) -> bool:
            near = index.nearest(KEY, embedding(name), 3, 0.99)
            return near is not None and near.base == name

        made = picture()
        other.add(made)
        assert found(made.id)
        other.note_base(made.id, BasePlace.NOWHERE)
        assert not found(made.id)
        other.note_base(made.id, BasePlace.SAVED)
        assert found(made.id)
        other.remove(made.id)
        assert not found(made.id)

    @pytest.mark.parametrize(
        "change",
        [{"kind": "edit"}, {"kind": "photo"}, {"embedding": None}, {"encoder": "another"}, {"key": "another"}],
    )
    def test_leaves_out(self, library: Library, change: dict[str, Any]) -> None:
        library.add(picture(**change))
        assert RequestIndex(library, ENCODER).nearest(KEY, embedding("anything"), None, -1.0) is None


class TestAgainstTheStore:
    def test_what_goes_from_the_store_goes_from_the_index(self, library: Library, tmp_path: Path) -> None:
        store = open_store(tmp_path, 2 * SIZE)
        bases: Any = HeldBases(None, store, library, 4)  # type: ignore[arg-type]
        pictures = [picture() for _ in range(4)]
        for each in pictures:
            library.add(each)
            bases.add(each.id, Small())
            bases.wait()
        index = RequestIndex(library, ENCODER)
        assert {base.name for base in store.bases()} == {each.id for each in pictures[2:]}
        assert len(index) == 2
        assert [library.get(each.id).base for each in pictures] == [0, 0, 2, 2]
        store.evict(SIZE)  # somebody else's hand
        note_saved_bases(store, library)
        assert len(index) == 1

    @pytest.mark.parametrize(
        "killed_at", ["before the base", "before it is noted", "behind the removal of the picture"]
    )
    def test_a_start_after_a_crash(
        self, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
    ) -> None:
        store, made = open_store(tmp_path, 4 * SIZE), picture()
        library.add(made)
        if killed_at != "before the base":
            store.put(Small(), made.id)
        if killed_at == "behind the removal of the picture":
            library.remove(made.id)
        store.put(Small(), "somebody-elses")
        note_saved_bases(store, library, held=False)
        kept = killed_at == "before it is noted"
        assert len(RequestIndex(library, ENCODER)) == kept
        assert {base.name for base in store.bases()} == ({made.id} if kept else set()) | {"somebody-elses"}

    def test_a_base_that_cannot_be_written_is_not_searched(
        self, library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = open_store(tmp_path, 1)
        bases: Any = HeldBases(None, store, library, 4)  # type: ignore[arg-type]
        made = picture()
        library.add(made)
        index = RequestIndex(library, ENCODER)
        assert len(index) == 1  # it is in memory
        bases.add(made.id, Small())
        bases.wait()
        assert "could not be written" in caplog.text
        assert len(index) == 0

    def test_nobody_waits_for_the_disk(self, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What it does not take in time is written later, if it is still in memory then."""
        store, disk = open_store(tmp_path, 100 * SIZE), threading.Event()
        put = store.put
        monkeypatch.setattr(store, "put", lambda *arguments, **options: (disk.wait(), put(*arguments, **options)))
        bases: Any = HeldBases(None, store, library, 3)  # type: ignore[arg-type]
        pictures = [picture() for _ in range(8)]
        for each in pictures:
            library.add(each)
            bases.add(each.id, Small())
        index = RequestIndex(library, ENCODER)
        assert len(index) == 7  # four that wait for the disk, and three in memory
        disk.set()
        bases.wait()
        assert {base.name for base in store.bases()} == {each.id for each in pictures} - {pictures[4].id}
        assert [library.get(each.id).base for each in pictures] == [2] * 4 + [0] + [2] * 3

    def test_those_that_leave_the_memory_are_not_written(
        self, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store, disk = open_store(tmp_path, 100 * SIZE), threading.Event()
        put = store.put
        monkeypatch.setattr(store, "put", lambda *arguments, **options: (disk.wait(), put(*arguments, **options)))
        bases: Any = HeldBases(None, store, library, 9)  # type: ignore[arg-type]
        pictures = [picture() for _ in range(7)]
        for each in pictures:
            library.add(each)
            bases.add(each.id, Small())
        bases.drop(pictures[5].id)
        assert library.get(pictures[5].id).base is BasePlace.NOWHERE
        bases.drop(pictures[1].id)  # it waits for the disk
        disk.set()
        bases.close()
        assert {base.name for base in store.bases()} == {each.id for each in pictures[:4]}

    @pytest.mark.parametrize(("patience", "in_the_end"), [(60.0, "it is quiet"), (0.5, "it is not")])
    def test_bases_are_written_while_nobody_waits_for_a_picture_and_at_last_in_any_case(
        self, library: Library, tmp_path: Path, patience: float, in_the_end: str
    ) -> None:
        store, made = open_store(tmp_path, 100 * SIZE), picture()
        library.add(made)
        bases: Any = HeldBases(None, store, library, 7, patience=patience)  # type: ignore[arg-type]
        bases.quiet.clear()
        bases.add(made.id, Small())
        time.sleep(0.1)
        assert store.bases() == []
        if in_the_end == "it is quiet":
            bases.quiet.set()
        bases.wait()
        assert [base.name for base in store.bases()] == [made.id]

    def test_nothing_is_written_where_nothing_is_reused(self, library: Library, tmp_path: Path) -> None:
        store, made = open_store(tmp_path, 100 * SIZE), picture()
        bases: Any = HeldBases(None, store, library, 7, write=False)  # type: ignore[arg-type]
        library.add(made)
        bases.add(made.id, Small())
        bases.wait()
        assert store.bases() == []
        assert bases.find(made.id) is not None

    def test_pictures_are_bounded(self, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(held_bases, "MOST_PICTURES", 2)
        for _ in range(4):
            library.add(picture(base=BasePlace.NOWHERE))
        note_saved_bases(open_store(tmp_path, SIZE), library)
        assert library.count() == 2

    def test_processes_all_of_which_are_killed(self, tmp_path: Path) -> None:
        script = ROOT / "tests" / "support" / "shared_library.py"
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path), "3", "7"], capture_output=True, text=True, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["bases"] > 0
