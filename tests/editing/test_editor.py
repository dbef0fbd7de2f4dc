"""The editor: what an edit may change, with several schedulers, sizes and batches, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from support.pipelines import CONFIG, EDIT, PROMPT, STEPS, arguments, generate, left_half, tiny_pipeline

import fisedit_compile.editing.editor as editor_module
from fisedit_compile import Base, BaseMismatchError, CaptureError, Editor, MaskError
from fisedit_compile.editing.edit_run import EditRun
from fisedit_compile.errors import PipelineInterruptedError
from fisedit_compile.testing import assert_close

OTHER = "an apple on the left"
SIDE = 16
SCHEDULERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[EditRun]:
    """The runs of the edits of a test: they know the latents of every step."""
    made: list[EditRun] = []

    class Noted(EditRun):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(editor_module, "EditRun", Noted)
    return made


def test_a_base_is_what_the_pipeline_generates(tiny_editor: Editor, tiny_base: Base) -> None:
    plain = tiny_editor.pipe(PROMPT, **arguments()).images[0]
    assert np.array_equal(np.asarray(plain), np.asarray(tiny_base.image))
    assert type(tiny_editor.pipe.unet).__name__ == "UNet2DConditionModel"  # never exchanged


def test_an_edit_of_a_saved_base_has_the_same_bits(tiny_editor: Editor, tiny_base: Base, tmp_path: Path) -> None:
    tiny_base.save(tmp_path / "base")
    want, got = (tiny_editor.edit(each, EDIT) for each in (tiny_base, tiny_editor.load(tmp_path / "base")))
    assert torch.equal(got.latents, want.latents)
    assert torch.equal(got.mask, want.mask)
    assert np.array_equal(np.asarray(got.image), np.asarray(want.image))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_background_is_the_bases_after_every_sparse_step(
    tiny_editor: Editor, monkeypatch: pytest.MonkeyPatch, scheduler: str, runs: list[EditRun]
) -> None:
    known = tiny_editor.pipe.scheduler
    monkeypatch.setattr(tiny_editor.pipe, "scheduler", getattr(diffusers, scheduler).from_config(known.config))
    base = generate(tiny_editor)
    edit = tiny_editor.edit(base, EDIT)
    assert edit.mask.dtype is torch.bool
    assert edit.mask.shape == (1, SIDE, SIDE)
    assert 0 < edit.mask.float().mean() < 1
    outside = ~edit.mask[:, None].expand_as(base.latents)
    for step in range(base.dense_steps - 1, STEPS):
        assert torch.equal(runs[0].latents[step][outside], base.step_latents[step][outside])
    assert not torch.equal(edit.latents, base.latents)
    assert edit.report.background_identical
    assert (edit.report.dense_steps, edit.report.sparse_steps) == (2, 2)
    assert edit.report.removed_words == (("cat",),)
    assert edit.report.added_words == (("dog",),)
    assert edit.report.macs["ratio"] > 1


def test_an_interrupted_base_is_refused(tiny_editor: Editor) -> None:
    def stop(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    with pytest.raises(PipelineInterruptedError, match=r"pipe\._interrupt"):
        generate(tiny_editor, callback_on_step_end=stop)


def test_edits_in_any_order_give_what_each_gives_alone(tiny_editor: Editor, tiny_base: Base) -> None:
    kept = [latents.clone() for latents in tiny_base.step_latents]
    first, other, again = (tiny_editor.edit(tiny_base, prompt) for prompt in (EDIT, OTHER, EDIT))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.latents, other.latents)
    assert all(map(torch.equal, kept, tiny_base.step_latents))


def test_a_batch_gives_what_each_sample_gives_alone(tiny_editor: Editor, tiny_base: Base) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = tiny_editor.edit(generate(tiny_editor, [PROMPT, PROMPT], generator=generators), [EDIT, OTHER])
    alone = tiny_editor.edit(tiny_base, EDIT)
    assert torch.equal(both.mask[0], alone.mask[0])
    assert_close(both.latents[:1], alone.latents)
    assert both.report.background_identical
    assert len(both.images) == 2


def test_without_guidance_on_a_picture_that_is_not_square(tiny_editor: Editor) -> None:
    base = generate(tiny_editor, guidance_scale=1.0, height=32, width=40)
    edit = tiny_editor.edit(base, EDIT)
    assert edit.mask.shape == (1, 16, 20)
    assert edit.report.background_identical


def test_several_images_of_a_prompt(tiny_editor: Editor) -> None:
    edit = tiny_editor.edit(generate(tiny_editor, num_images_per_prompt=2, num_inference_steps=3), EDIT)
    assert edit.mask.shape[0] == len(edit.images) == 2
    assert edit.report.background_identical


def test_a_mask_of_ones_own(tiny_editor: Editor, tiny_base: Base) -> None:
    mask = np.zeros((2 * SIDE, 2 * SIDE), dtype=bool)
    mask[8:24, :16] = True
    edit = tiny_editor.edit(tiny_base, EDIT, mask)
    wanted = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    wanted[:, 4:12, :8] = True
    assert torch.equal(edit.mask, wanted)
    assert edit.report.mask_source == "given"


def test_a_mask_of_ones_own_with_the_one_that_is_found(tiny_editor: Editor, tiny_base: Base) -> None:
    found = tiny_editor.edit(tiny_base, EDIT, torch.ones(SIDE, SIDE), combine="and").mask
    mine = torch.roll(found, 1, dims=1)
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, mine, combine="and").mask, found & mine)
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT, mine, combine="or").mask, found | mine)
    elsewhere = torch.zeros_like(found)
    elsewhere[(~found).nonzero()[0].unbind()] = True
    with pytest.raises(MaskError, match="do not meet"):
        tiny_editor.edit(tiny_base, EDIT, elsewhere, combine="and")


def test_no_dense_step_with_a_mask(tiny_editor: Editor, runs: list[EditRun]) -> None:
    editor = Editor(tiny_editor.pipe, {"dense_steps": 0})
    base = generate(editor)
    with pytest.raises(ValueError, match="dense_steps=0"):
        editor.edit(base, EDIT)
    edit = editor.edit(base, EDIT, left_half())
    assert edit.report.dense_steps == 0
    outside = ~left_half().expand_as(base.latents)
    for edited, recorded in zip(runs[0].latents, base.step_latents, strict=True):
        assert torch.equal(edited[outside], recorded[outside])


def test_callbacks_run_and_may_change_the_latents_of_the_mask(tiny_editor: Editor, tiny_base: Base) -> None:
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": values["latents"] + 1}

    edit = tiny_editor.edit(tiny_base, EDIT, callback_on_step_end=callback)
    assert seen == list(range(STEPS))
    assert edit.report.background_identical


def test_bad_input_is_refused_and_the_base_stays_usable(tiny_editor: Editor, tiny_base: Base) -> None:
    before = tiny_editor.edit(tiny_base, EDIT)
    for error, message, given in [
        (ValueError, "the base's own", (tiny_base, PROMPT)),
        (ValueError, r"2 prompt\(s\)", (tiny_base, [EDIT, EDIT])),
        (ValueError, "pass what editor.generate", ("base", EDIT)),
        (MaskError, "mask", (tiny_base, EDIT, torch.zeros(SIDE, SIDE, dtype=torch.bool))),
        (MaskError, "mask", (tiny_base, EDIT, torch.full((SIDE, SIDE), torch.nan))),
        (MaskError, "mask", (tiny_base, EDIT, torch.ones(3, SIDE, SIDE, dtype=torch.bool))),
    ]:
        with pytest.raises(error, match=message):
            tiny_editor.edit(*given)
    with pytest.raises(ValueError, match="combine"):
        tiny_editor.edit(tiny_base, EDIT, combine="and")
    assert torch.equal(tiny_editor.edit(tiny_base, EDIT).latents, before.latents)


def test_a_base_of_another_model_scheduler_or_config_is_refused(tiny_base: Base) -> None:
    pipe = tiny_pipeline()
    with pytest.raises(BaseMismatchError, match="config"):
        Editor(pipe, {**CONFIG, "attention": "masked"}).edit(tiny_base, EDIT)
    pipe.unet.conv_in.weight.data.mul_(2)
    with pytest.raises(BaseMismatchError, match="another U-Net"):
        Editor(pipe, CONFIG).edit(tiny_base, EDIT)
    pipe.scheduler = diffusers.EulerDiscreteScheduler(steps_offset=1)
    with pytest.raises(BaseMismatchError, match="scheduler"):
        Editor(pipe, CONFIG).edit(tiny_base, EDIT)


def test_all_steps_dense_is_no_edit(tiny_editor: Editor) -> None:
    with pytest.raises(ValueError, match="lower dense_steps"):
        tiny_editor.edit(generate(tiny_editor, num_inference_steps=CONFIG["dense_steps"]), EDIT)


def test_what_is_no_pipeline_is_refused(tiny_editor: Editor) -> None:
    with pytest.raises(CaptureError, match="pipeline"):
        Editor(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown config field"):
        Editor(tiny_editor.pipe, {"sparsity": 1})
