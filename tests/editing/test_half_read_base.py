"""A saved base that is used while it is still being read, and what happens to its files meanwhile."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pipelines import EDIT, left_half

from fisedit_compile import Base, BaseInUseError, BaseMemoryError, BaseMismatchError, DamagedBaseError, Editor
from fisedit_compile.cache.landing import Landing
from fisedit_compile.cache.read_base import BaseFolder, open_base
from fisedit_compile.cache.remove_base import remove_base, why_kept
from fisedit_compile.cache.store import BaseStore
from fisedit_compile.editing.recorded_call import RecordedCall
from fisedit_compile.editing.saved_call import SavedCall
from fisedit_compile.errors import BaseStorageError

pytestmark = pytest.mark.usefixtures("one_thread")

LAST = "call-0003.safetensors"


class Gate:
    """Lets shards of calls be read when it is opened for them; nothing is opened of the file before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._changed, self._open, self._all = threading.Condition(), set[str](), False
        real = Landing.read

        def read(landing: Landing, shard: str, *rest: Any) -> Any:
            with self._changed:
                self._changed.wait_for(lambda: self._all or not shard.startswith("call-") or shard in self._open)
            return real(landing, shard, *rest)

        monkeypatch.setattr(Landing, "read", read)

    def open(self, *shards: str) -> None:
        """For some shards, or for all."""
        with self._changed:
            self._open |= set(shards)
            self._all = self._all or not shards
            self._changed.notify_all()

    def open_but_the_last(self) -> None:
        self.open("call-0000.safetensors", "call-0001.safetensors", "call-0002.safetensors")


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


@pytest.fixture(scope="module")
def want(tiny_editor: Editor, tiny_base: Base) -> torch.Tensor:
    return tiny_editor.edit(tiny_base, EDIT, left_half()).latents


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A thread that does some work, and what becomes of it: a value or an error."""
    results: list[Any] = []

    def run() -> None:
        torch.set_num_threads(1)
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


class TestSteps:
    def test_a_step_waits_for_its_own_call_alone(
        self, tiny_editor: Editor, folder: Path, want: torch.Tensor, gate: Gate
    ) -> None:
        base, steps = tiny_editor.load(folder), []

        def ended(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            steps.append(step)
            gate.open(f"call-{step + 1:04}.safetensors")
            return kwargs

        gate.open("call-0000.safetensors")
        got = tiny_editor.edit(base, EDIT, left_half(), callback_on_step_end=ended).latents
        assert steps == [0, 1, 2, 3]
        assert torch.equal(got, want)

    def test_two_threads_edit_it(self, tiny_editor: Editor, folder: Path, want: torch.Tensor, gate: Gate) -> None:
        base = tiny_editor.load(folder)
        works = [in_thread(lambda: tiny_editor.edit(base, EDIT, left_half()).latents) for _ in range(2)]
        gate.open()
        for thread, results in works:
            thread.join(60)
            assert torch.equal(results[0], want)

    def test_two_editors_of_one_pipeline(
        self, tiny_editor: Editor, folder: Path, want: torch.Tensor, gate: Gate
    ) -> None:
        """Nobody waits for the disk with a lock that another editor needs to read a base of its own."""
        other = Editor(tiny_editor.pipe, tiny_editor.config)
        bases = [each.load(folder) for each in (tiny_editor, other)]
        works = [
            in_thread(lambda editor=editor, base=base: editor.edit(base, EDIT, left_half()).latents)  # type: ignore[misc]
            for editor, base in zip((tiny_editor, other), bases, strict=True)
        ]
        gate.open()
        for thread, results in works:
            thread.join(60)
            assert torch.equal(results[0], want)

    def test_the_mask_is_found_before_the_last_call_is_in(
        self, tiny_editor: Editor, tiny_base: Base, folder: Path, gate: Gate
    ) -> None:
        expected = tiny_editor.edit(tiny_base, EDIT)
        base = tiny_editor.load(folder)
        gate.open_but_the_last()
        thread, results = in_thread(lambda: tiny_editor.edit(base, EDIT))
        thread.join(0.5)
        assert thread.is_alive()
        gate.open()
        thread.join(60)
        assert torch.equal(results[0].latents, expected.latents)
        assert torch.equal(results[0].mask, expected.mask)

    def test_nothing_is_read_for_another_pipeline(self, tiny_editor: Editor, folder: Path) -> None:
        with pytest.raises(BaseMismatchError, match="the base was kept for") as refused:
            Editor(tiny_editor.pipe, {"dense_steps": 1}).load(folder)
        assert why_kept(folder) == ""
        assert refused.value.__traceback__  # which holds the frames


class TestWhatIsSaidOfIt:
    def test_what_is_known_at_once(self, tiny_editor: Editor, tiny_base: Base, folder: Path, gate: Gate) -> None:
        base = tiny_editor.load(folder)
        assert base.nbytes == tiny_base.nbytes
        assert base.tier == tiny_base.tier
        assert [call.step for call in base.calls] == [call.step for call in tiny_base.calls]
        assert [call.nbytes for call in base.calls] == [call.nbytes for call in tiny_base.calls]
        assert "SavedCall(step=3, is_in=False)" in repr(base)
        assert not any(call.is_in for call in base.calls)
        assert all(isinstance(call, SavedCall) for call in base.calls)
        gate.open()
        base.wait()
        assert all(call.is_in for call in base.calls)
        assert [call.device for call in base.calls] == [call.device for call in tiny_base.calls]
        assert base.nbytes == tiny_base.nbytes

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda base: pickle.loads(pickle.dumps(base))])
    def test_copies_are_whole(
        self, tiny_editor: Editor, folder: Path, want: torch.Tensor, gate: Gate, copied: Callable[[Base], Base]
    ) -> None:
        base = tiny_editor.load(folder)
        gate.open_but_the_last()
        thread, results = in_thread(lambda: copied(base))
        thread.join(0.2)
        assert thread.is_alive()
        gate.open()
        thread.join(60)
        assert {type(call) for call in results[0].calls} == {RecordedCall}
        assert torch.equal(tiny_editor.edit(results[0], EDIT, left_half()).latents, want)

    def test_it_is_saved_again_whole(
        self, tiny_editor: Editor, folder: Path, want: torch.Tensor, gate: Gate, tmp_path: Path
    ) -> None:
        base = tiny_editor.load(folder)
        gate.open_but_the_last()
        thread, results = in_thread(lambda: base.save(tmp_path / "again"))
        thread.join(0.2)
        assert thread.is_alive()
        assert not (tmp_path / "again").exists()
        gate.open()
        thread.join(60)
        assert results == [None]
        with open_base(tmp_path / "again") as again, open_base(folder) as first:
            assert {each.name: each for each in again.manifest.files if "call" in each.name} == {
                each.name: each for each in first.manifest.files if "call" in each.name
            }

    def test_nothing_is_saved_of_one_that_turns_out_damaged(
        self, tiny_editor: Editor, folder: Path, gate: Gate, tmp_path: Path
    ) -> None:
        base = tiny_editor.load(folder)
        (folder / LAST).unlink()
        gate.open()
        with pytest.raises(DamagedBaseError, match=rf"{LAST} is missing"):
            base.save(tmp_path / "again")
        assert not (tmp_path / "again").exists()


def replaced(path: Path) -> None:
    other = path.with_name("call-0002.safetensors")
    path.unlink()
    shutil.copy(other, path)


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 0x10
    path.write_bytes(data)


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "removed": (Path.unlink, "is missing"),
    "cut short": (lambda path: os.truncate(path, 10_000), "has 10000 bytes instead of"),
    "a bit flipped": (flipped, "is not what was written"),
    "another call": (replaced, "(is not what was written|has .* bytes instead of)"),
    "a link": (linked, "is a symbolic link"),
    "the folder removed": (lambda path: shutil.rmtree(path.parent), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_damaged_while_a_base_is_read(
    tiny_editor: Editor, tiny_base: Base, folder: Path, want: torch.Tensor, gate: Gate, damage: str
) -> None:
    """The edit that needs it ends with an error, and so does each later one; other bases are edited as ever."""
    base = tiny_editor.load(folder)
    gate.open_but_the_last()
    assert all(call.cache for call in base.calls[:3])
    change, words = DAMAGES[damage]
    change(folder / LAST)
    thread, results = in_thread(lambda: tiny_editor.edit(base, EDIT, left_half()))
    thread.join(0.3)
    assert thread.is_alive()
    gate.open()
    thread.join(60)
    assert isinstance(results[0], DamagedBaseError)
    for again in (lambda: tiny_editor.edit(base, EDIT, left_half()), base.wait, lambda: base.calls[0].cache):
        with pytest.raises(DamagedBaseError, match=rf"base: {LAST} {words}.*: remove the folder and generate"):
            again()
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, left_half()).latents, want)
    if folder.exists():
        assert why_kept(folder) == ""


def test_a_file_that_cannot_be_read(
    tiny_editor: Editor, folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, real = tiny_editor.load(folder), os.open

    def refused(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == LAST:
            raise PermissionError(13, os.strerror(13))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", refused)
    gate.open()
    with pytest.raises(BaseStorageError, match=rf"{LAST} cannot be read \(Permission denied\)"):
        tiny_editor.edit(base, EDIT, left_half())
    assert why_kept(folder) == ""


def test_memory_runs_out_while_a_base_is_read(
    tiny_editor: Editor, tiny_base: Base, folder: Path, want: torch.Tensor, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, real = tiny_editor.load(folder), Landing._allocated

    def full(landing: Landing, stretches: Any) -> Any:
        if threading.current_thread().name == "read-base":
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return real(landing, stretches)

    monkeypatch.setattr(Landing, "_allocated", full)
    gate.open()
    with pytest.raises(BaseMemoryError, match=r"base does not fit beside what cpu and the host hold: free some"):
        tiny_editor.edit(base, EDIT, left_half())
    monkeypatch.undo()
    assert why_kept(folder) == ""
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, left_half()).latents, want)
    assert torch.equal(tiny_editor.edit(tiny_editor.load(folder), EDIT, left_half()).latents, want)


class TestItsFolder:
    def test_it_cannot_be_removed_until_the_last_call_is_in(
        self, tiny_editor: Editor, folder: Path, want: torch.Tensor, gate: Gate
    ) -> None:
        base, store = tiny_editor.load(folder), BaseStore(folder.parent, 2**30)
        gate.open_but_the_last()
        assert all(call.cache for call in base.calls[:3])
        for remove in (lambda: remove_base(folder), lambda: store.remove("base"), lambda: store.evict(1)):
            with pytest.raises(BaseInUseError, match="base is in use"):
                remove()
        gate.open()
        base.wait()
        store.remove("base")
        assert torch.equal(tiny_editor.edit(base, EDIT, left_half()).latents, want)

    def test_an_edit_of_given_words_is_enough(self, tiny_editor: Editor, folder: Path) -> None:
        tiny_editor.edit(tiny_editor.load(folder), EDIT, left_half())
        remove_base(folder)

    def test_a_base_that_nobody_holds_any_more_is_not_read_further(
        self, tiny_editor: Editor, folder: Path, gate: Gate, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = tiny_editor.load(folder)
        assert "in use" in why_kept(folder)
        real, read = BaseFolder.read_shard, []

        def counted(opened: Any, name: str, receive: Any) -> None:
            def few(parts: Any) -> Iterator[memoryview]:
                for piece in receive(parts):
                    read.append(name)
                    yield piece

            real(opened, name, few)

        monkeypatch.setattr(BaseFolder, "read_shard", counted)
        del base
        gc.collect()
        gate.open()
        for _ in range(1000):
            if not why_kept(folder):
                break
            threading.Event().wait(0.01)
        assert why_kept(folder) == ""
        assert not read
        remove_base(folder)

    def test_an_editor_that_is_freed_waits_for_it(
        self, tiny_editor: Editor, folder: Path, want: torch.Tensor, gate: Gate
    ) -> None:
        editor = Editor(tiny_editor.pipe, tiny_editor.config)
        base = editor.load(folder)
        thread, _ = in_thread(editor.free)
        thread.join(0.1)
        assert thread.is_alive()
        gate.open()
        thread.join(60)
        assert why_kept(folder) == ""
        assert torch.equal(tiny_editor.edit(base, EDIT, left_half()).latents, want)

    def test_a_damaged_one_does_not_keep_an_editor_from_being_freed(
        self, tiny_editor: Editor, folder: Path, gate: Gate
    ) -> None:
        editor = Editor(tiny_editor.pipe, tiny_editor.config)
        base = editor.load(folder)
        (folder / LAST).unlink()
        gate.open()
        editor.free()
        with pytest.raises(DamagedBaseError, match=LAST):
            editor.edit(base, EDIT, left_half())
