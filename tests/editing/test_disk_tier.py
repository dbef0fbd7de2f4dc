"""A saved base that stays on the disk: its edits, the memory that they take, and what happens to its files."""

from __future__ import annotations

import gc
import os
import pickle
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pipelines import EDIT, left_half

from fisedit_compile import Base, BaseInUseError, BaseMemoryError, DamagedBaseError, Editor, SavedBaseError
from fisedit_compile.cache import memory, read_ahead
from fisedit_compile.cache.landing import Landing
from fisedit_compile.cache.read_ahead import AHEAD, ReadAhead
from fisedit_compile.cache.reading import Shard
from fisedit_compile.cache.remove_base import remove_base
from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.ir.call import Signature

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_editor: Editor, folder: Path) -> Base:
    return tiny_editor.load(folder, tier="disk")


@pytest.mark.parametrize("mask", [left_half(), None], ids=["given", "found"])
def test_edits_are_those_of_the_base_in_memory(
    tiny_editor: Editor, tiny_base: Base, base: Base, mask: torch.Tensor | None
) -> None:
    want = tiny_editor.edit(tiny_base, EDIT, mask)
    for _ in range(2):
        got = tiny_editor.edit(base, EDIT, mask)
        assert torch.equal(got.latents, want.latents)
        assert torch.equal(got.mask, want.mask)


def test_edits_of_edits(tiny_editor: Editor, tiny_base: Base, base: Base) -> None:
    first, want = (tiny_editor.edit(each, EDIT, left_half()) for each in (base, tiny_base))
    assert torch.equal(
        tiny_editor.edit(first, "a pig", ~left_half()).latents, tiny_editor.edit(want, "a pig", ~left_half()).latents
    )


def test_it_says_where_it_lies_and_takes_no_memory(tiny_editor: Editor, tiny_base: Base, base: Base) -> None:
    assert (base.tier, tiny_base.tier) == ("disk", "device")
    calls = sum(call.nbytes for call in tiny_base.calls)
    assert base.nbytes == tiny_base.nbytes - calls
    assert "stays" not in repr(base.calls[0])


def test_an_edit_holds_the_calls_around_its_step_alone(
    tiny_editor: Editor, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one of its step, and one that is let go of."""
    monkeypatch.setattr(read_ahead, "AHEAD", 0)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most, real = [0], Landing.read

    def read(landing: Landing, *rest: Any) -> Any:
        tensors = real(landing, *rest)
        alive.add(next(iter(tensors.values())).untyped_storage())
        most[0] = max(most[0], len(alive))
        return tensors

    monkeypatch.setattr(Landing, "read", read)
    tiny_editor.edit(base, EDIT, left_half())
    assert len(base.calls) == 4
    assert 1 <= most[0] <= 2
    base.wait()
    gc.collect()
    assert len(alive) == 0


def test_copies_and_saved_ones_are_whole(
    tiny_editor: Editor, tiny_base: Base, base: Base, folder: Path, tmp_path: Path
) -> None:
    want = tiny_editor.edit(tiny_base, EDIT, left_half()).latents
    base.save(tmp_path / "again")
    copied = pickle.loads(pickle.dumps(base))
    assert copied.tier == "device"
    for each in (copied, tiny_editor.load(tmp_path / "again")):
        assert torch.equal(tiny_editor.edit(each, EDIT, left_half()).latents, want)


def test_its_folder_is_kept_as_long_as_somebody_holds_it(tiny_editor: Editor, folder: Path) -> None:
    base = tiny_editor.load(folder, tier="disk")
    tiny_editor.edit(base, EDIT, left_half())
    tiny_editor.free()
    with pytest.raises(BaseInUseError):
        remove_base(folder)
    del base
    gc.collect()
    remove_base(folder)


def test_a_file_that_changes_between_two_edits(tiny_editor: Editor, base: Base, folder: Path) -> None:
    """Who changes it meanwhile gets an error, who restores it the picture."""
    want = tiny_editor.edit(base, EDIT, left_half()).latents
    file = folder / "call-0002.safetensors"
    data = file.read_bytes()
    for broken in (data[:-1] + bytes([data[-1] ^ 1]), data[:-10]):
        file.write_bytes(broken)
        with pytest.raises(DamagedBaseError, match="call-0002"):
            tiny_editor.edit(base, EDIT, left_half())
        file.write_bytes(data)
        assert torch.equal(tiny_editor.edit(base, EDIT, left_half()).latents, want)


def test_two_editors_at_once(tiny_editor: Editor, tiny_base: Base, base: Base) -> None:
    """They are at different steps of it."""
    editors = [tiny_editor, Editor(tiny_editor.pipe, tiny_editor.config)]
    words = [EDIT, "a pig"]
    want = [tiny_editor.edit(tiny_base, each, left_half()).latents for each in words]
    with ThreadPoolExecutor(2) as threads:
        made = [
            threads.submit(editor.edit, base, each, left_half()) for editor, each in zip(editors, words, strict=True)
        ]
        for got, latents in zip(made, want, strict=True):
            assert torch.equal(got.result().latents, latents)


def test_no_room_even_for_the_calls_of_a_step(
    tiny_editor: Editor, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = sorted(call.nbytes for call in tiny_editor.load(folder).calls)
    monkeypatch.setattr(memory, "_available", lambda: sum(need) - 1)
    with pytest.raises(BaseMemoryError, match=r"load\(\.\.\., tier='disk'\)"):
        tiny_editor.load(folder)
    monkeypatch.setattr(memory, "_available", lambda: sum(need[-AHEAD - 1 :]))
    assert tiny_editor.load(folder, tier="disk").tier == "disk"
    monkeypatch.setattr(memory, "_available", lambda: sum(need[-AHEAD - 1 :]) - 1)
    with pytest.raises(BaseMemoryError):
        tiny_editor.load(folder, tier="disk")


def test_another_tier(tiny_editor: Editor, folder: Path) -> None:
    with pytest.raises(ValueError, match="tier='host': 'disk' leaves a base there, None reads it into memory"):
        tiny_editor.load(folder, tier="host")  # type: ignore[arg-type]


class TestReadAhead:
    def shards(self, read: list[int], count: int = 9) -> list[Shard]:
        def shard(index: int) -> Shard:
            def reads(go_on: Any) -> Recorded:
                go_on()
                read.append(index)
                return Recorded(Signature("", ()), (torch.tensor(index),), {})

            return Shard(reads, 1, CPU)

        return [shard(index) for index in range(count)]

    def test_the_next_ones_are_read_before_they_are_asked_for(self) -> None:
        read: list[int] = []
        ahead = ReadAhead("base", self.shards(read))
        for index in range(9):
            for _ in range(2):  # for its own step, and before, for what comes behind another one
                assert ahead.get(index).timesteps == (torch.tensor(index),)
            assert max(read) <= index + AHEAD
        ahead.stop()
        assert sorted(read) == list(range(9))

    def test_steps_backwards_read_what_they_ask_for(self) -> None:
        read: list[int] = []
        ahead = ReadAhead("base", self.shards(read))
        for index in (4, 3, 2):
            ahead.get(index)
        ahead.stop()
        assert sorted(read)[:2] == [2, 3]
        assert not {0, 1} & set(read)

    def test_one_that_is_asked_for_twice_is_the_same(self) -> None:
        ahead = ReadAhead("base", self.shards([]))
        assert ahead.get(1) is ahead.get(1)
        one = ahead.get(1)
        ahead.stop()
        assert ahead.get(1) is not one

    def test_threads_that_are_at_different_steps(self) -> None:
        """One lets go of what another one waits for, which is not there yet as all readers are busy."""
        count, read = 12, list[int]()
        ahead = ReadAhead("base", [self.slow(shard) for shard in self.shards(read, count)])

        def steps(start: int) -> list[int]:
            order = [(start + 5 * index) % count for index in range(3 * count)]
            return [int(ahead.get(each).timesteps[0] or 0) - each for each in order]

        with ThreadPoolExecutor(6) as threads:
            for made in [threads.submit(steps, 2 * start) for start in range(6)]:
                assert not any(made.result(timeout=60))
        ahead.stop()

    def slow(self, shard: Shard) -> Shard:
        def read(go_on: Any) -> Recorded:
            time.sleep(0.002)
            return shard.read(go_on)

        return Shard(read, shard.nbytes, shard.device)

    def test_in_a_forked_process(self) -> None:
        ahead = ReadAhead("base", self.shards([]))
        ahead.get(0)
        child = os.fork()
        if not child:
            try:
                ahead.get(0)
            except SavedBaseError as error:
                os._exit(7 if "load it again" in str(error) else 1)
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
