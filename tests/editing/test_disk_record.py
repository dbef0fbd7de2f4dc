"""Bases that are saved while they are recorded: what lies in their folder, and what is left when something fails."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.pipelines import EDIT, left_half, tiny_pipeline

from fisedit_compile import (
    Base,
    BaseStorageError,
    Editor,
    PipelineInterruptedError,
    SavedBaseError,
)
from fisedit_compile.cache.read_base import open_base
from fisedit_compile.cache.write_base import BaseWriter
from fisedit_compile.editing import disk_record

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT, STEPS = "a cat on the left", 8


def generate(editor: Editor, folder: Path | None = None, **options: Any) -> Base:
    seeded = torch.Generator().manual_seed(0)
    return editor.generate(PROMPT, num_inference_steps=STEPS, generator=seeded, folder=folder, **options)


@pytest.fixture(scope="module")
def editor() -> Editor:
    """One for all tests: a base that fails leaves it as it was."""
    return Editor(tiny_pipeline())


def test_it_is_the_base_that_is_saved_afterwards(editor: Editor, tmp_path: Path) -> None:
    in_memory, on_disk = generate(editor), generate(editor, tmp_path / "new" / "base")
    assert (in_memory.tier, on_disk.tier) == ("device", "disk")
    assert on_disk.image.tobytes() == in_memory.image.tobytes()
    in_memory.save(tmp_path / "other")
    with open_base(tmp_path / "new" / "base") as written, open_base(tmp_path / "other") as saved:
        written.verify()
        calls = [
            {file.name: file.checksum for file in each.manifest.files if "call" in file.name}
            for each in (written, saved)
        ]
        assert len(calls[0]) == STEPS
        assert calls[0] == calls[1]
        assert written.manifest.summary == saved.manifest.summary
    want = editor.edit(in_memory, EDIT, left_half())
    assert torch.equal(editor.edit(on_disk, EDIT, left_half()).latents, want.latents)
    assert torch.equal(editor.edit(editor.load(tmp_path / "new" / "base"), EDIT, left_half()).latents, want.latents)


def test_of_a_photo(editor: Editor, tmp_path: Path) -> None:
    photo = Image.effect_noise((32, 32), 60).convert("RGB")
    in_memory, on_disk = (
        editor.invert(photo, PROMPT, num_inference_steps=STEPS, folder=folder) for folder in (None, tmp_path / "base")
    )
    want, got = (editor.edit(base, EDIT, left_half()) for base in (in_memory, on_disk))
    assert torch.equal(got.latents, want.latents)
    assert got.image.tobytes() == want.image.tobytes()


def test_few_calls_wait_for_the_disk(editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, gate = threading.Semaphore(0), threading.Event()
    real = BaseWriter._write_shard

    def slow(writer: BaseWriter, *arguments: Any) -> Any:
        begun.release()
        assert gate.wait(60)
        return real(writer, *arguments)

    monkeypatch.setattr(BaseWriter, "_write_shard", slow)
    monkeypatch.setattr(disk_record, "_MOST_WAITING", 2)
    with ThreadPoolExecutor(1) as thread:
        base = thread.submit(generate, editor, tmp_path / "base")
        for _ in range(2):
            assert begun.acquire(timeout=60)
        assert not begun.acquire(timeout=0.5)
        gate.set()
        assert base.result().tier == "disk"


def test_a_disk_that_is_full(editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = os.write, [0]

    def write(descriptor: int, data: Any) -> int:
        written[0] += len(data)
        if written[0] > 200_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(BaseStorageError, match=r"No space left on device.*nothing is left of it"):
        generate(editor, tmp_path / "base")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert generate(editor, tmp_path / "base").tier == "disk"


def test_what_is_known_before_is_said_before(editor: Editor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []

    def watch(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(index)
        return {}

    (tmp_path / "taken" / "file").mkdir(parents=True)
    with pytest.raises(SavedBaseError, match="taken is there already"):
        generate(editor, tmp_path / "taken", callback_on_step_end=watch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(BaseStorageError, match=r"0\.0 MiB are free there"):
        generate(editor, tmp_path / "base", callback_on_step_end=watch)
    assert steps == []
    assert [each.name for each in tmp_path.iterdir()] == ["taken"]


def test_one_that_is_stopped_leaves_nothing(editor: Editor, tmp_path: Path) -> None:
    def stop(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 2
        return {}

    with pytest.raises(PipelineInterruptedError):
        generate(editor, tmp_path / "base", callback_on_step_end=stop)
    assert list(tmp_path.iterdir()) == []


def test_errors_of_others_are_theirs(editor: Editor, tmp_path: Path) -> None:
    def fail(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        raise FileNotFoundError("the callback's own")

    with pytest.raises(FileNotFoundError, match="the callback's own"):
        generate(editor, tmp_path / "base", callback_on_step_end=fail)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    editor = Editor(tiny_pipeline().to("cuda", torch.float16))
    in_memory, on_disk = generate(editor), generate(editor, tmp_path / "base")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        on_another_stream = generate(editor, tmp_path / "other")
    want = editor.edit(in_memory, EDIT, left_half())
    for base in (on_disk, on_another_stream):
        assert torch.equal(editor.edit(base, EDIT, left_half()).latents, want.latents)
