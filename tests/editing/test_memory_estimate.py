"""A base that does not fit is refused before its first step, and what it will take is known to the byte."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.pipelines import EDIT, generate, left_half

import fisedit_compile.cache.host_tier as host_tier
import fisedit_compile.cache.memory as memory
from fisedit_compile import Base, BaseMemoryError, Editor
from fisedit_compile.cache.host_tier import HostMemory
from fisedit_compile.editing.record_run import RecordRun

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_estimate_is_what_the_base_takes(tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what it keeps of the decoder, which is known once that is captured, and takes less than a U-Net call."""
    base = generate(tiny_editor, num_images_per_prompt=2)
    assert base.decoded is not None
    nbytes = base.nbytes - base.decoded.nbytes
    for free in (nbytes, nbytes - 1):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free)
        if free == nbytes:
            generate(tiny_editor, num_images_per_prompt=2)
            continue
        with pytest.raises(BaseMemoryError, match=r"A base of 4 steps would take 0\.0 GiB of cpu"):
            generate(tiny_editor, num_images_per_prompt=2)


def test_the_message_names_what_shrinks_it_and_nothing_is_computed(
    tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)

    def record(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("recorded before it was refused")

    monkeypatch.setattr(type(tiny_editor.unet), "record", record)
    with pytest.raises(BaseMemoryError) as refused:
        generate(tiny_editor, num_images_per_prompt=2)
    for option in ("fewer than 4 steps", "height and width", "2 pictures", "half", "'masked'", "cross_replace"):
        assert option in str(refused.value)


def test_options_that_would_not_help_are_not_named(tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    editor = Editor(tiny_editor.pipe, {"attention": "masked", "cross_replace": 0.0})
    with pytest.raises(BaseMemoryError) as refused:
        generate(editor)
    for option in ("pictures", "'masked'", "cross_replace"):
        assert option not in str(refused.value)


@pytest.mark.parametrize("calls", [1, 3])
def test_memory_that_runs_out_while_a_base_is_recorded(
    tiny_editor: Editor, tiny_base: Base, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may take it behind the look; other bases are edited as ever, and the next one is recorded."""
    want = tiny_editor.edit(tiny_base, EDIT, left_half()).latents
    fail_after(monkeypatch, tiny_editor, "record", calls)
    with pytest.raises(BaseMemoryError, match=rf"memory ran out at step {calls} of a base of 4: let go of other bases"):
        generate(tiny_editor)
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, left_half()).latents, want)
    monkeypatch.undo()
    assert torch.equal(generate(tiny_editor).latents, tiny_base.latents)


def test_host_memory_that_runs_out_while_a_base_is_recorded(
    tiny_editor: Editor, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = tiny_editor.edit(tiny_base, EDIT, left_half()).latents
    monkeypatch.setattr(RecordRun, "_choose_tier", lambda run, call: HostMemory(torch.device("cpu")))
    monkeypatch.setattr(host_tier, "_CHUNK", 2**50)
    with pytest.raises(BaseMemoryError, match=r"the host gives no 1073741824 MiB more for a base: let go of others"):
        generate(tiny_editor)
    monkeypatch.undo()
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, left_half()).latents, want)


def test_memory_that_runs_out_while_an_edit_runs(
    tiny_editor: Editor, tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base stays what it was, and the edit can be made again."""
    want = tiny_editor.edit(tiny_base, EDIT, left_half()).latents
    fail_after(monkeypatch, tiny_editor, "step", 2)
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        tiny_editor.edit(tiny_base, EDIT, left_half())
    monkeypatch.undo()
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, left_half()).latents, want)


def fail_after(monkeypatch: pytest.MonkeyPatch, editor: Editor, method: str, calls: int) -> None:
    """Let a method of the editor's U-Net find no memory, some calls later."""
    kind, left = type(editor.unet), [calls]
    real = getattr(kind, method)

    def failing(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(kind, method, failing)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    from support.pipelines import CONFIG, tiny_pipeline

    editor = Editor(tiny_pipeline().to("cuda"), CONFIG)
    base = generate(editor)
    assert all(kept.device == torch.device("cuda", 0) for call in base.calls for kept in call.cache.values())
