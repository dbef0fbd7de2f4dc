"""A store of bases: its budget, which of them go, what is in use, and several processes that share it."""

from __future__ import annotations

import errno
import json
import os
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support.packed import packed_base
from support.pipelines import EDIT, left_half

from fisedit_compile import Base, BaseFormatError, BaseInUseError, BaseStorageError, BaseStore, Editor, SavedBaseError
from fisedit_compile.cache.packed_base import PackedBase
from fisedit_compile.cache.read_base import open_base

ROOT = Path(__file__).parents[2]


class Small:
    """A base without a model behind it."""

    def __init__(self, number: int = 0, kib: int = 16) -> None:
        self.number, self.kib = number, kib

    def pack(self) -> PackedBase:
        return packed_base(self.number, kib=self.kib)


SIZE = Small().pack().nbytes


def names(store: BaseStore) -> list[str]:
    return [base.name for base in store.bases()]


@pytest.fixture
def store(tmp_path: Path) -> BaseStore:
    """Room for three small bases."""
    return BaseStore(tmp_path / "new" / "store", 3 * SIZE)


def filled(store: BaseStore, *wanted: str) -> BaseStore:
    for i, name in enumerate(wanted):
        store.put(Small(i), name)
    return store


class TestBudget:
    def test_those_go_that_were_not_used_for_longest(self, store: BaseStore) -> None:
        filled(store, "a", "b", "c")
        with store.get("a"):
            pass
        store.put(Small(), "d")
        assert names(store) == ["c", "a", "d"]
        store.put(Small(), "e")
        assert names(store) == ["a", "d", "e"]
        assert sum(base.bytes for base in store.bases()) <= store.max_bytes

    def test_writing_gives_way_behind_each_piece(self, store: BaseStore) -> None:
        pieces: list[None] = []
        store.put(Small(), "a", give_way=lambda: pieces.append(None))
        assert len(pieces) == 2 * len(Small().pack().shards)  # of each file the header, and one tensor
        with store.get("a") as folder, open_base(folder) as opened:
            opened.verify()

    def test_one_in_use_stays(self, store: BaseStore) -> None:
        filled(store, "a", "b", "c")
        with store.get("a") as folder:
            store.put(Small(), "d")
            assert names(store) == ["c", "a", "d"]
            with open_base(folder) as opened:
                opened.verify()
            with pytest.raises(BaseInUseError, match="a is in use"):
                store.remove("a")
        store.remove("a")
        assert names(store) == ["c", "d"]

    def test_no_room_beside_those_in_use(self, store: BaseStore) -> None:
        filled(store, "a", "b")
        with store.get("a"), store.get("b"), pytest.raises(BaseInUseError, match="a is in use"):
            store.put(Small(kib=48), "large")
        assert names(store) == ["a", "b"]
        store.put(Small(kib=48), "large")
        assert names(store) == ["b", "large"]

    def test_a_base_that_is_larger_than_the_budget(self, store: BaseStore) -> None:
        filled(store, "a")
        with pytest.raises(SavedBaseError, match=r"the base takes 0\.\d MiB, and all bases in .* may take 0\.\d MiB"):
            store.put(Small(kib=160))
        assert names(store) == ["a"]

    def test_evict_to_less(self, store: BaseStore) -> None:
        filled(store, "a", "b", "c")
        (store.folder / ".a.01234567.partial").mkdir()
        assert store.evict() == []
        assert not (store.folder / ".a.01234567.partial").exists()
        assert store.evict(SIZE) == ["a", "b"]
        assert store.evict(0) == ["c"]
        assert names(store) == []

    def test_a_record_that_fails_leaves_the_others(self, store: BaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
        filled(store, "a")

        def full(*args: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(BaseStorageError, match="No space left on device"):
                store.put(Small(), "b")
        assert names(store) == ["a"]
        assert sorted(each.name for each in store.folder.iterdir()) == [".lock", "a"]


class TestFolder:
    def test_names(self, store: BaseStore) -> None:
        made = store.put(Small())
        assert names(store) == [made]
        with pytest.raises(SavedBaseError, match=f"{made} is there already"):
            store.put(Small(), made)
        for name in ("", "../a", ".hidden", "a/b", "a b", "x" * 200):
            with pytest.raises(ValueError, match="give letters, digits"):
                store.put(Small(), name)
        with pytest.raises(BaseFormatError, match="nothing is no folder of a saved base"), store.get("nothing"):
            pass
        with pytest.raises(ValueError, match="max_bytes=0: give the bytes"):
            BaseStore(store.folder, 0)

    def test_what_else_lies_there_is_left_alone(self, store: BaseStore, tmp_path: Path) -> None:
        filled(store, "a")
        (store.folder / "notes").mkdir()
        (store.folder / "app").mkdir()
        (store.folder / "app" / "manifest.json").write_text('{"name": "an app"}')
        (store.folder / "file").touch()
        (store.folder / "link").symlink_to(store.folder / "a")
        (store.folder / "loop").symlink_to(store.folder)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (store.folder / ".a.01234567.partial").symlink_to(elsewhere)
        assert names(store) == ["a"]
        with pytest.raises(BaseFormatError, match="link is no folder of a saved base"), store.get("link"):
            pass
        assert store.evict(0) == ["a"]
        left = {each.name for each in store.folder.iterdir()}
        assert left == {".lock", "notes", "app", "file", "link", "loop", ".a.01234567.partial"}
        assert elsewhere.is_dir()

    def test_a_base_beside_files_of_others_stays_and_counts(self, store: BaseStore) -> None:
        filled(store, "a", "b")
        (store.folder / "a" / "note.txt").touch()
        with pytest.raises(BaseInUseError, match=r"bases that have to stay take 0\.1 MiB of .*a holds note\.txt"):
            store.evict(1)
        assert sorted(names(store)) == ["a", "b"]

    def test_a_damaged_base_is_listed_with_its_fault_and_goes_like_others(self, store: BaseStore) -> None:
        filled(store, "a", "b")
        (store.folder / "a" / "manifest.json").write_text('{"format": "fisedit_compile base", "format_version": 9}')
        (store.folder / "b" / "manifest.json").write_text("{")
        problems = {base.name: base.problem for base in store.bases()}
        assert "a is of format 9" in problems["a"]
        assert "manifest.json is damaged" in problems["b"]
        assert all(base.manifest is None and base.bytes > 0 for base in store.bases())
        assert sorted(store.evict(0)) == ["a", "b"]

    def test_a_folder_that_cannot_be_one(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(BaseStorageError, match="file cannot be a folder of bases"):
            BaseStore(tmp_path / "file", 1)


class TestSharing:
    def test_threads_take_turns(self, store: BaseStore) -> None:
        failures: list[Exception] = []

        def put(number: int) -> None:
            for i in range(3):
                try:
                    store.put(Small(number), f"{number}-{i}")
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert len(names(store)) == 3
        for name in names(store):
            with store.get(name) as folder, open_base(folder) as opened:
                opened.verify()

    def test_processes_some_of_which_are_killed(self, tmp_path: Path) -> None:
        script = ROOT / "tests" / "support" / "shared_store.py"
        argv = [sys.executable, script, tmp_path / "store", "4", "20", "0"]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["killed"] == 2


@pytest.mark.usefixtures("one_thread")
def test_edits_of_a_stored_base(tiny_editor: Editor, tiny_base: Base, tmp_path: Path) -> None:
    store = BaseStore(tmp_path / "store", 8 * 2**20)
    name = store.put(tiny_base)
    with store.get(name) as folder:
        loaded = tiny_editor.load(folder)
    loaded.wait()
    store.remove(name)  # a base that was read is in memory
    want, got = (tiny_editor.edit(base, EDIT, left_half()).latents for base in (tiny_base, loaded))
    assert torch.equal(got, want)


@pytest.mark.usefixtures("one_thread")
def test_random_operations_lose_no_base_and_change_none(tiny_editor: Editor, tmp_path: Path) -> None:
    """The short form of ``benchmarks/base_soak.py``; processes that are killed are in the tests above."""
    soak = runpy.run_path(str(ROOT / "benchmarks" / "base_soak.py"))["Soak"]
    short = soak([tiny_editor], {"num_inference_steps": 4}, tmp_path, seed=4, kills=False)
    short.run(60)
    assert not short.faults
    names = ["record_on_disk", "chain", "save", "load", "evict", "damage", "fill_disk", "use"]
    names += ["edit_half_read", "let_go_half_read", "damage_half_read", "edit_on_disk"]
    assert [name for name in names if not short.done[name]] == []  # of this seed
