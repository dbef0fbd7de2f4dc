"""Edits of edits: each round starts from the picture that the last one left, and needs nothing of its base."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from support.pipelines import CONFIG, EDIT, PROMPT, generate, left_half, tiny_pipeline

from fisedit_compile import Base, BaseMismatchError, Edit, Editor

pytestmark = pytest.mark.usefixtures("one_thread")

AGAIN = "an apple on the left"
SCHEDULERS = [
    DDIMScheduler(steps_offset=1, clip_sample=False),
    DPMSolverMultistepScheduler(steps_offset=1),
    EulerDiscreteScheduler(steps_offset=1),
]


def right_half() -> torch.Tensor:
    return ~left_half()


def pixels(edit: Edit | Base) -> np.ndarray[Any, Any]:
    return np.stack([np.asarray(each) for each in edit.images])


@pytest.fixture(scope="module")
def editors() -> dict[int, Editor]:
    """One for each stride, with a pipeline of its own, whose scheduler may be any of ``SCHEDULERS``."""
    return {stride: Editor(tiny_pipeline(), {**CONFIG, "stride": stride}) for stride in (1, 2)}


@pytest.fixture(scope="module", params=[(0, 1), (0, 2), (1, 2), (2, 2)], ids=str)
def rounds(request: pytest.FixtureRequest, editors: dict[int, Editor]) -> tuple[Editor, Base, Edit]:
    """An editor, a base of eight steps, and an edit of its left half."""
    scheduler, stride = request.param
    editor = editors[stride]
    editor.pipe.scheduler = SCHEDULERS[scheduler]
    base = generate(editor, num_inference_steps=8)
    return editor, base, editor.edit(base, EDIT, left_half())


def test_outside_its_mask_a_second_round_is_the_first(rounds: tuple[Editor, Base, Edit]) -> None:
    editor, base, first = rounds
    before = base.latents.clone()
    second = editor.edit(first, AGAIN, right_half())
    outside = ~second.mask[:, None].expand_as(second.latents)
    assert torch.equal(second.latents[outside], first.latents[outside])
    assert not torch.equal(second.latents[~outside], first.latents[~outside])
    assert second.report.background_identical
    assert np.array_equal(pixels(second)[:, :, 0], pixels(first)[:, :, 0])
    assert torch.equal(base.latents, before)
    third = editor.edit(second, PROMPT, left_half())
    assert torch.equal(third.latents[outside == 0], second.latents[outside == 0])
    again = editor.edit(editor.edit(first, AGAIN, right_half()), PROMPT, left_half())
    assert torch.equal(third.latents, again.latents)


def test_the_base_of_an_edit_is_its_picture(rounds: tuple[Editor, Base, Edit]) -> None:
    editor, base, first = rounds
    own = editor.base_of(first)
    assert own is editor.base_of(first)  # recorded once
    assert torch.equal(own.latents, first.latents)
    assert np.array_equal(pixels(own), pixels(first))
    assert own.prompts == (EDIT,)
    assert (own.visits, own.num_inference_steps) == (base.visits, base.num_inference_steps)
    for visit, latents in enumerate(first.trajectory.latents):
        assert torch.equal(own.latents_after(visit), latents)
    assert [call.step for call in own.calls] == list(base.visits)


def test_a_mask_is_found_in_a_second_round(rounds: tuple[Editor, Base, Edit]) -> None:
    editor, _, first = rounds
    second = editor.edit(first, AGAIN)
    assert second.report.mask_source == "found"
    assert second.report.background_identical


def test_the_first_base_may_go(tiny_editor: Editor) -> None:
    editor = tiny_editor
    base = generate(editor)
    edit, cache = editor.edit(base, EDIT, left_half()), weakref.ref(base.calls[-1].cache)
    del base
    gc.collect()
    assert cache() is None
    assert editor.edit(edit, AGAIN, right_half()).report.background_identical
    own = weakref.ref(editor.base_of(edit))
    del edit
    gc.collect()
    assert own() is None


def test_it_is_saved_and_read_as_any_base(editors: dict[int, Editor], tmp_path: Path) -> None:
    editor = editors[2]
    first = editor.edit(generate(editor, num_inference_steps=8), EDIT, left_half())
    own = editor.base_of(first)
    own.save(tmp_path / "base")
    loaded = editor.load(tmp_path / "base")
    assert torch.equal(editor.edit(loaded, AGAIN, right_half()).latents, editor.edit(own, AGAIN, right_half()).latents)


def test_samples_and_arguments_that_an_edit_changed_stay(tiny_editor: Editor) -> None:
    editor = tiny_editor
    base = generate(editor, [PROMPT, PROMPT], negative_prompt="apple")
    first = editor.edit(base, [EDIT, PROMPT], left_half(), negative_prompt="dog")
    own = editor.base_of(first)
    assert own.prompts == (EDIT, PROMPT)
    assert own.arguments["negative_prompt"] == ["dog", "dog"]
    second = editor.edit(first, [EDIT, AGAIN], left_half())
    assert torch.equal(second.latents[0], first.latents[0])


def test_what_has_changed_since_is_refused() -> None:
    editor = Editor(tiny_pipeline(), CONFIG)
    edit = editor.edit(generate(editor), EDIT, left_half())
    with pytest.raises(BaseMismatchError, match="this editor has"):
        Editor(editor.pipe, {**CONFIG, "attention": "masked"}).edit(edit, AGAIN, left_half())
    scheduler = editor.pipe.scheduler
    editor.pipe.scheduler = SCHEDULERS[1]
    with pytest.raises(BaseMismatchError, match="is another one"):
        editor.edit(edit, AGAIN, left_half())
    editor.pipe.scheduler = scheduler
    with torch.no_grad():
        editor.pipe.unet.conv_in.weight.mul_(1.01)
    with pytest.raises(BaseMismatchError, match="the edit was made with another U-Net"):
        editor.edit(edit, AGAIN, left_half())


def test_an_edit_without_pictures_is_refused(tiny_editor: Editor, tiny_base: Base) -> None:
    edit = tiny_editor.edit(tiny_base, EDIT, left_half(), output_type="latent")
    with pytest.raises(ValueError, match="latents in the place of pictures"):
        tiny_editor.edit(edit, AGAIN, left_half())


def test_a_callback_that_changed_the_loop_cannot_be_recorded_without(tiny_editor: Editor, tiny_base: Base) -> None:
    def scaled(pipe: Any, step: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"latents": values["latents"] * 1.01}

    edit = tiny_editor.edit(tiny_base, EDIT, left_half(), callback_on_step_end=scaled)
    with pytest.raises(BaseMismatchError, match="scaled"):
        tiny_editor.edit(edit, AGAIN, left_half())


@pytest.mark.parametrize("kind", ["np", "pt"])
def test_pictures_of_any_kind_are_edited_again_as_that_kind(tiny_editor: Editor, kind: str) -> None:
    editor = tiny_editor
    first = editor.edit(generate(editor, output_type=kind), EDIT, left_half())
    second = editor.edit(first, AGAIN, right_half())
    assert type(second.images) is type(first.images)
    columns = [edit.images[:, :, 0] if kind == "np" else edit.images[..., 0] for edit in (first, second)]
    assert np.array_equal(*map(np.asarray, columns))
    of_pil = editor.edit(generate(editor), EDIT, left_half(), output_type=kind, background="latents")
    assert editor.base_of(of_pil).arguments["output_type"] == kind
    assert type(editor.edit(of_pil, AGAIN, right_half()).images) is type(of_pil.images)
