"""``pipe._interrupt`` stops a generation or an edit with an error of ours, and leaves nothing half done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pipelines import EDIT, STEPS, generate, left_half

from fisedit_compile import Base, Editor, FiseditError, PipelineInterruptedError

pytestmark = pytest.mark.usefixtures("one_thread")


def set_on_the_callbacks_own(own: Any, original: Any) -> None:
    own._interrupt = True


def set_on_the_pipeline(own: Any, original: Any) -> None:
    original._interrupt = True


def set_by_another_thread(own: Any, original: Any) -> None:
    thread = threading.Thread(target=lambda: setattr(original, "_interrupt", True))
    thread.start()
    thread.join()


@pytest.mark.parametrize("where", [set_on_the_callbacks_own, set_on_the_pipeline, set_by_another_thread])
@pytest.mark.parametrize("last", [0, 1, STEPS - 1])
def test_a_run_that_is_stopped_leaves_everything_usable(
    tiny_editor: Editor, tiny_base: Base, where: Callable[..., None], last: int
) -> None:
    steps: list[int] = []

    def stop(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        steps.append(step)
        if step == last:
            where(pipe, tiny_editor.pipe)
        return values

    want = tiny_editor.edit(tiny_base, EDIT, left_half())
    with pytest.raises(PipelineInterruptedError, match=r"stopped by pipe._interrupt"):
        generate(tiny_editor, callback_on_step_end=stop)
    with pytest.raises(PipelineInterruptedError, match="it can be made again"):
        tiny_editor.edit(tiny_base, EDIT, left_half(), callback_on_step_end=stop)
    assert steps == 2 * list(range(last + 1))
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, left_half()).latents, want.latents)
    assert issubclass(PipelineInterruptedError, FiseditError)


def test_it_is_seen_between_the_end_of_a_step_and_the_next(
    tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As set by another thread while the scheduler or a ControlNet runs."""
    steps: list[int] = []
    scale = type(tiny_editor.pipe.scheduler).scale_model_input

    def scale_model_input(scheduler: Any, *args: Any) -> Any:
        steps.append(len(steps))
        tiny_editor.pipe._interrupt = len(steps) == 3
        return scale(scheduler, *args)

    monkeypatch.setattr(type(tiny_editor.pipe.scheduler), "scale_model_input", scale_model_input)
    with pytest.raises(PipelineInterruptedError):
        generate(tiny_editor)
    assert len(steps) == 3


def test_one_that_was_left_from_an_earlier_call_stops_nothing(tiny_editor: Editor, tiny_base: Base) -> None:
    tiny_editor.pipe._interrupt = True
    assert torch.equal(generate(tiny_editor).latents, tiny_base.latents)


def test_models_are_offloaded_as_after_a_whole_call(tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[str] = []
    monkeypatch.setattr(tiny_editor.pipe, "maybe_free_model_hooks", lambda: freed.append("freed"), raising=False)

    def stop(pipe: Any, *_: Any) -> None:
        pipe._interrupt = True

    with pytest.raises(PipelineInterruptedError):
        generate(tiny_editor, callback_on_step_end=stop)
    assert freed == ["freed"]
    generate(tiny_editor)
    assert freed == ["freed"] * 2
