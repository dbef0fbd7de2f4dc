"""The editor on the demo model: what an edit may change, with several schedulers, sizes and batches, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fisedit_compile.editing.editor as editor_module
from fisedit_compile import BaseMismatchError, CaptureError, Editor, MaskError
from fisedit_compile.editing.edit_run import EditRun
from fisedit_compile.errors import PipelineInterruptedError
from fisedit_compile.testing import assert_close

MODEL = Path(__file__).parents[2] / "examples" / "demo_model"
CAT = "a cat on the left and a red car on the right, on a green background"
DOG = "a dog on the left and a red car on the right, on a green background"
BLUE = "a cat on the left and a blue car on the right, on a green background"
STEPS = 5
#: 128x128 pixels are 32x32 latents; two of the five steps are dense.
SIZE = {"height": 128, "width": 128}
CONFIG = {"dense_below": 8, "dense_steps": 2}
SCHEDULERS = [
    "DDIMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
]

pytestmark = pytest.mark.usefixtures("one_thread")


def load_pipeline(scheduler: str = "DDIMScheduler") -> Any:
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(editor: Editor, prompt: Any = CAT, **arguments: Any) -> Any:
    arguments = {"num_inference_steps": STEPS, "guidance_scale": 5.0, **SIZE, **arguments}
    arguments.setdefault("generator", torch.Generator().manual_seed(3))
    return editor.generate(prompt, **arguments)


@pytest.fixture(scope="module")
def editor() -> Editor:
    return Editor(load_pipeline(), CONFIG)


@pytest.fixture(scope="module")
def base(editor: Editor) -> Any:
    return generate(editor)


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


def test_a_base_is_what_the_pipeline_generates(editor: Editor, base: Any) -> None:
    plain = editor.pipe(
        CAT, num_inference_steps=STEPS, guidance_scale=5.0, generator=torch.Generator().manual_seed(3), **SIZE
    ).images[0]
    assert np.array_equal(np.asarray(plain), np.asarray(base.image))
    assert type(editor.pipe.unet).__name__ == "UNet2DConditionModel"  # put back


def test_an_edit_of_a_saved_base_has_the_same_bits(editor: Editor, base: Any, tmp_path: Path) -> None:
    base.save(tmp_path / "base")
    want, got = (editor.edit(each, DOG) for each in (base, editor.load(tmp_path / "base")))
    assert torch.equal(got.latents, want.latents)
    assert torch.equal(got.mask, want.mask)
    assert np.array_equal(np.asarray(got.image), np.asarray(want.image))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_background_is_the_bases_after_every_sparse_step(scheduler: str, runs: list[EditRun]) -> None:
    editor = Editor(load_pipeline(scheduler), CONFIG)
    base = generate(editor)
    edit = editor.edit(base, DOG)
    assert edit.mask.dtype is torch.bool
    assert edit.mask.shape == (1, 32, 32)
    assert 0 < edit.mask.float().mean() < 1
    outside = ~edit.mask[:, None].expand_as(base.latents)
    for step in range(base.dense_steps - 1, STEPS):
        assert torch.equal(runs[0].latents[step][outside], base.step_latents[step][outside])
    assert not torch.equal(edit.latents, base.latents)
    assert edit.report.background_identical
    assert (edit.report.dense_steps, edit.report.sparse_steps) == (2, 3)
    assert edit.report.removed_words == (("cat",),)
    assert edit.report.added_words == (("dog",),)
    assert edit.report.macs["ratio"] > 1


def test_an_interrupted_base_is_refused(editor: Editor) -> None:
    def stop(pipe: Any, *_: Any) -> dict[str, Any]:
        pipe._interrupt = True
        return {}

    with pytest.raises(PipelineInterruptedError, match=r"pipe\._interrupt"):
        generate(editor, callback_on_step_end=stop)


def test_edits_in_any_order_give_what_each_gives_alone(editor: Editor, base: Any) -> None:
    kept = [latents.clone() for latents in base.step_latents]
    first, other, again = (editor.edit(base, prompt) for prompt in (DOG, BLUE, DOG))
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.mask, again.mask)
    assert not torch.equal(first.latents, other.latents)
    assert all(map(torch.equal, kept, base.step_latents))


def test_a_batch_gives_what_each_sample_gives_alone(editor: Editor, base: Any) -> None:
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    both = editor.edit(generate(editor, [CAT, CAT], generator=generators), [DOG, BLUE])
    alone = editor.edit(base, DOG)
    assert torch.equal(both.mask[0], alone.mask[0])
    assert_close(both.latents[:1], alone.latents)
    assert both.report.background_identical
    assert len(both.images) == 2


def test_without_guidance_on_a_picture_that_is_not_square(editor: Editor) -> None:
    base = generate(editor, guidance_scale=1.0, height=104, width=160)
    edit = editor.edit(base, DOG)
    assert edit.mask.shape == (1, 26, 40)
    assert edit.report.background_identical


def test_several_images_of_a_prompt(editor: Editor) -> None:
    edit = editor.edit(generate(editor, num_images_per_prompt=2, num_inference_steps=3), DOG)
    assert edit.mask.shape[0] == len(edit.images) == 2
    assert edit.report.background_identical


def test_a_mask_of_ones_own(editor: Editor, base: Any) -> None:
    mask = np.zeros((128, 128), dtype=bool)
    mask[32:96, :64] = True
    edit = editor.edit(base, DOG, mask)
    wanted = torch.zeros(1, 32, 32, dtype=torch.bool)
    wanted[:, 8:24, :16] = True
    assert torch.equal(edit.mask, wanted)
    assert edit.report.mask_source == "given"


def test_a_mask_of_ones_own_with_the_one_that_is_found(editor: Editor, base: Any) -> None:
    found = editor.edit(base, DOG).mask
    mine = torch.roll(found, 1, dims=1)
    assert torch.equal(editor.edit(base, DOG, mine, combine="and").mask, found & mine)
    assert torch.equal(editor.edit(base, DOG, mine, combine="or").mask, found | mine)
    elsewhere = torch.zeros_like(found)
    elsewhere[(~found).nonzero()[0].unbind()] = True
    with pytest.raises(MaskError, match="do not meet"):
        editor.edit(base, DOG, elsewhere, combine="and")


def test_no_dense_step_with_a_mask(runs: list[EditRun]) -> None:
    editor = Editor(load_pipeline(), {**CONFIG, "dense_steps": 0})
    base = generate(editor)
    with pytest.raises(ValueError, match="dense_steps=0"):
        editor.edit(base, DOG)
    mask = torch.zeros(32, 32, dtype=torch.bool)
    mask[8:20, 2:14] = True
    edit = editor.edit(base, DOG, mask)
    assert edit.report.dense_steps == 0
    outside = ~mask.expand_as(base.latents)
    for edited, recorded in zip(runs[0].latents, base.step_latents, strict=True):
        assert torch.equal(edited[outside], recorded[outside])


def test_callbacks_run_and_may_change_the_latents_of_the_mask(editor: Editor, base: Any) -> None:
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": values["latents"] + 1}

    edit = editor.edit(base, DOG, callback_on_step_end=callback)
    assert seen == list(range(STEPS))
    assert edit.report.background_identical


def test_bad_input_is_refused_and_the_base_stays_usable(editor: Editor, base: Any) -> None:
    before = editor.edit(base, DOG)
    for error, message, arguments in [
        (ValueError, "the base's own", (base, CAT)),
        (ValueError, r"2 prompt\(s\)", (base, [DOG, DOG])),
        (ValueError, "pass what editor.generate", ("base", DOG)),
        (MaskError, "mask", (base, DOG, torch.zeros(32, 32, dtype=torch.bool))),
        (MaskError, "mask", (base, DOG, torch.full((32, 32), torch.nan))),
        (MaskError, "mask", (base, DOG, torch.ones(3, 32, 32, dtype=torch.bool))),
    ]:
        with pytest.raises(error, match=message):
            editor.edit(*arguments)
    with pytest.raises(ValueError, match="combine"):
        editor.edit(base, DOG, combine="and")
    assert torch.equal(editor.edit(base, DOG).latents, before.latents)


def test_a_base_of_another_model_scheduler_or_config_is_refused(base: Any) -> None:
    with pytest.raises(BaseMismatchError, match="scheduler"):
        Editor(load_pipeline("EulerDiscreteScheduler"), CONFIG).edit(base, DOG)
    with pytest.raises(BaseMismatchError, match="config"):
        Editor(load_pipeline(), {**CONFIG, "attention": "masked"}).edit(base, DOG)
    pipe = load_pipeline()
    pipe.unet.conv_in.weight.data.mul_(2)
    with pytest.raises(BaseMismatchError, match="another U-Net"):
        Editor(pipe, CONFIG).edit(base, DOG)


def test_all_steps_dense_is_no_edit() -> None:
    editor = Editor(load_pipeline(), {**CONFIG, "dense_steps": 3})
    with pytest.raises(ValueError, match="lower dense_steps"):
        editor.edit(generate(editor, num_inference_steps=3), DOG)


def test_what_is_no_pipeline_is_refused() -> None:
    with pytest.raises(CaptureError, match="pipeline"):
        Editor(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unknown config field"):
        Editor(load_pipeline(), {"sparsity": 1})
