"""Callbacks run as in the pipeline itself, and one that changes the loop is repeated by edits or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from diffusers.callbacks import (
    IPAdapterScaleCutoffCallback,
    MultiPipelineCallbacks,
    PipelineCallback,
    SDCFGCutoffCallback,
)
from support.pipelines import EDIT, PROMPT, STEPS, arguments, generate, left_half

from fisedit_compile import Base, BaseMismatchError, Editor
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


class Watching(PipelineCallback):
    """Notes what it is given."""

    tensor_inputs: ClassVar[list[str]] = ["negative_prompt_embeds"]

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: Any) -> dict[str, Any]:
        self.seen.append((step_index, int(timestep), sorted(callback_kwargs), pipeline.num_timesteps))
        return callback_kwargs  # type: ignore[no-any-return]


def cutoff(ratio: float = 0.5) -> SDCFGCutoffCallback:
    return SDCFGCutoffCallback(cutoff_step_ratio=ratio)


def louder(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    return {"latents": 1.1 * values["latents"]}


@pytest.mark.parametrize(
    "callback",
    [cutoff(0.0), cutoff(0.5), MultiPipelineCallbacks([Watching(), cutoff()])],
    ids=["in the dense steps", "in the sparse steps", "several"],
)
def test_guidance_that_ends_within_the_loop(tiny_editor: Editor, callback: Any) -> None:
    plain = tiny_editor.pipe(PROMPT, output_type="latent", callback_on_step_end=callback, **arguments()).images
    base = generate(tiny_editor, callback_on_step_end=callback)
    assert_close(base.latents, plain)
    assert [call.cache.signature.sample_shape[0] for call in base.calls][:: STEPS - 1] == [2, 1]
    edit = tiny_editor.edit(base, EDIT, left_half(), callback_on_step_end=callback)
    assert edit.report.background_identical
    assert not torch.equal(edit.latents, base.latents)
    with pytest.raises(
        BaseMismatchError, match="SDCFGCutoffCallback, which changed _guidance_scale, prompt_embeds: give"
    ):
        tiny_editor.edit(base, EDIT, left_half())


def test_guidance_that_ends_in_the_edit_alone_is_refused(tiny_editor: Editor, tiny_base: Base) -> None:
    with pytest.raises(
        BaseMismatchError, match=r"at step 3 .* was with .*the edit has the callback SDCFGCutoffCallback"
    ):
        tiny_editor.edit(tiny_base, EDIT, left_half(), callback_on_step_end=cutoff())


def test_a_full_mask_under_a_cutoff_is_the_plain_pipeline(tiny_editor: Editor) -> None:
    """No dense step of the edit is controlled, so nothing is left of the base."""
    editor = Editor(tiny_editor.pipe, {"dense_steps": 1, "cross_replace": 0.0})
    base = generate(editor, callback_on_step_end=cutoff())
    edit = editor.edit(base, EDIT, torch.ones(16, 16), callback_on_step_end=cutoff())
    plain = tiny_editor.pipe(EDIT, output_type="latent", callback_on_step_end=cutoff(), **arguments()).images
    assert (edit.latents - plain).abs().max() < 0.05 * plain.abs().max()  # norms are the base's
    assert (base.latents - plain).abs().max() > (edit.latents - plain).abs().max()


def test_an_official_callback_is_given_what_it_asks_for(tiny_editor: Editor, tiny_base: Base) -> None:
    plain, ours = Watching(), Watching()
    tiny_editor.pipe(PROMPT, callback_on_step_end=plain, **arguments())
    base = generate(tiny_editor, callback_on_step_end=ours)
    assert plain.seen == ours.seen
    assert len(ours.seen) == STEPS
    assert base.callback == ""  # it changed nothing, and edits can do without it
    assert tiny_editor.edit(base, EDIT, left_half()).report.background_identical
    assert len(ours.seen) == STEPS  # a callback of generate is not run by edits
    assert torch.equal(base.latents, tiny_base.latents)


def test_one_that_returns_nothing_changes_nothing(tiny_editor: Editor, tiny_base: Base) -> None:
    assert torch.equal(generate(tiny_editor, callback_on_step_end=lambda *_: None).latents, tiny_base.latents)


@pytest.mark.parametrize("in_place", [False, True])
def test_changed_latents_are_noticed(tiny_editor: Editor, in_place: bool) -> None:
    def change(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if in_place:
            values["latents"].mul_(1.1)
        return values if in_place else {"latents": 1.1 * values["latents"]}

    base = generate(tiny_editor, callback_on_step_end=change)
    plain = tiny_editor.pipe(PROMPT, output_type="latent", callback_on_step_end=louder, **arguments()).images
    assert torch.equal(base.latents, plain)
    with pytest.raises(BaseMismatchError, match="change, which changed latents: give edit the same"):
        tiny_editor.edit(base, EDIT, left_half())
    assert tiny_editor.edit(base, EDIT, left_half(), callback_on_step_end=change).report.background_identical


def test_guidance_that_changes_is_followed(tiny_editor: Editor) -> None:
    def fade(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 5.0 - step
        return values

    plain = tiny_editor.pipe(PROMPT, output_type="latent", callback_on_step_end=fade, **arguments()).images
    base = generate(tiny_editor, callback_on_step_end=fade)
    assert torch.equal(base.latents, plain)
    assert base.callback.endswith("fade, which changed _guidance_scale")


def test_one_that_changes_the_editors_pipeline_instead_of_its_argument_is_refused(tiny_editor: Editor) -> None:
    tiny_editor.pipe(PROMPT, **arguments())  # so that there is a guidance scale to change

    def fade(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        tiny_editor.pipe._guidance_scale = 2.5
        return values

    with pytest.raises(ValueError, match=r"fade changed _guidance_scale of the pipeline itself: .* first argument"):
        generate(tiny_editor, callback_on_step_end=fade)


def test_one_that_changes_the_model_within_the_loop_is_refused(tiny_editor: Editor) -> None:
    callback = MultiPipelineCallbacks([IPAdapterScaleCutoffCallback(cutoff_step_ratio=0.5)])
    with pytest.raises(
        ValueError, match="IPAdapterScaleCutoffCallback changes the scale of the IP-Adapter within the loop"
    ):
        generate(tiny_editor, callback_on_step_end=callback)


def test_one_that_changes_the_loop_meets_edits_of_a_stride(tiny_editor_with: Callable[..., Editor]) -> None:
    """Such edits run it at some steps alone, which is not what the base did."""
    editor = tiny_editor_with(stride=2)
    with pytest.raises(
        ValueError, match=r"stride=2: SDCFGCutoffCallback may change the loop .*; pass stride=1 or 'auto'"
    ):
        generate(editor, callback_on_step_end=cutoff())
    with pytest.raises(ValueError, match=r"louder, which changed latents, runs at all 6 steps .*'stride': 1"):
        generate(editor, callback_on_step_end=louder, num_inference_steps=6)
    watching: list[int] = []
    base = generate(editor, callback_on_step_end=lambda pipe, step, *_: watching.append(step), num_inference_steps=6)
    assert watching == list(range(6))
    assert len(base.visits) < 6
