"""Edits whose steps all run dense, which sparse edits are held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support.pipelines import CONFIG, EDIT, PROMPT, STEPS, arguments, generate, left_half

from fisedit_compile import Base, BaseMismatchError, Editor

#: Keeps the attention maps of every step.
ALL_MAPS = {"dense_steps": STEPS, "cross_replace": 1.0, "stride": 1}


@pytest.fixture(scope="module")
def reference_editor(tiny_editor: Editor) -> Editor:
    return Editor(tiny_editor.pipe, ALL_MAPS)


@pytest.fixture(scope="module")
def reference_base(reference_editor: Editor) -> Base:
    return generate(reference_editor)


def pixels(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).astype(int)


def test_without_control_and_mask_it_is_the_plain_picture_of_the_new_words(
    reference_editor: Editor, reference_base: Base
) -> None:
    edit = reference_editor.edit(reference_base, EDIT, dense=True, cross_replace=0)
    plain = reference_editor.pipe(EDIT, **arguments()).images
    assert np.abs(pixels(edit.images) - pixels(plain)).max() <= 1
    assert edit.mask.all()
    report = edit.report
    assert (report.dense_steps, report.sparse_steps, report.mask_source) == (STEPS, 0, "none")
    assert report.ran_dense
    assert report.macs["ratio"] == 1.0


def test_longer_control_brings_the_edit_nearer_to_its_base(reference_editor: Editor, reference_base: Base) -> None:
    """The random U-Net's words change little, but all of it comes through its cross-attention."""
    edits = [
        reference_editor.edit(reference_base, EDIT, dense=True, cross_replace=share).latents
        for share in (0.0, 0.5, 1.0)
    ]
    assert not torch.equal(edits[0], edits[1])
    assert not torch.equal(edits[1], edits[2])
    controlled = reference_editor.edit(reference_base, EDIT, dense=True).latents
    assert torch.equal(controlled, edits[2])


def test_control_is_prompt_to_prompt_of_as_many_steps(reference_editor: Editor, reference_base: Base) -> None:
    """A base that keeps the maps of its first step alone allows the control of that one, with the same result."""
    short = Editor(reference_editor.pipe, {**ALL_MAPS, "dense_steps": 1, "cross_replace": 1 / STEPS})
    base = generate(short)
    assert base.controlled_steps == 1
    by_short = short.edit(base, EDIT, mask=left_half(), dense=True).latents
    by_long = reference_editor.edit(reference_base, EDIT, dense=True, cross_replace=1 / STEPS)
    assert not torch.equal(by_short, by_long.latents)  # a mask restores the background in one of them
    free = short.edit(base, EDIT, dense=True).latents
    assert torch.allclose(free, by_long.latents, atol=1e-5)


def test_under_a_mask_it_is_the_sparse_edit_whose_steps_ran_dense(tiny_editor: Editor) -> None:
    """A mask above ``dense_above`` makes the steps behind it dense ones, which should be the only difference."""
    editor = Editor(tiny_editor.pipe, {**CONFIG, "dense_above": 0.01})
    base = generate(editor)
    ours, dense = editor.edit(base, EDIT, mask=left_half()), editor.edit(base, EDIT, mask=left_half(), dense=True)
    assert (ours.report.dense_steps, ours.report.sparse_steps) == (0, STEPS)
    assert dense.report.sparse_steps == 0
    assert torch.equal(ours.latents, dense.latents)
    assert np.array_equal(pixels(ours.images), pixels(dense.images))


def test_under_a_mask_the_background_is_the_bases(tiny_editor: Editor, tiny_base: Base) -> None:
    part = tiny_editor.edit(tiny_base, EDIT, mask=left_half(), dense=True)
    outside = ~part.mask[:, None].expand_as(part.latents)
    assert torch.equal(part.latents[outside], tiny_base.latents[outside])
    assert not torch.equal(part.latents[~outside], tiny_base.latents[~outside])
    assert part.report.background_identical
    assert part.report.mask_source == "given"
    assert part.report.mask_area == 0.5


def test_a_mask_holds_from_the_first_step_where_no_step_of_the_base_is_sparse(
    reference_editor: Editor, reference_base: Base
) -> None:
    mask = left_half()
    edit = reference_editor.edit(reference_base, EDIT, mask=mask, dense=True, cross_replace=0)
    seen = []

    def note(pipe: Any, step: int, timestep: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del pipe, timestep
        restored = torch.where(mask, values["latents"], reference_base.step_latents[step])
        seen.append(step)
        return {"latents": restored}

    plain = reference_editor.pipe(EDIT, **arguments(), callback_on_step_end=note, output_type="latent").images
    assert seen == list(range(STEPS))
    assert torch.allclose(edit.latents, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"dense": True, "cross_replace": 0.75}, BaseMismatchError, "attention maps of 3 steps, and the base keeps"),
        ({"dense": True, "cross_replace": 1.5}, ValueError, "in \\[0, 1\\]"),
        ({"dense": True, "cross_replace": True}, ValueError, "in \\[0, 1\\]"),
        ({"dense": 1}, ValueError, "give True or False"),
        ({"cross_replace": 0.75}, BaseMismatchError, "attention maps of 3 steps, and the base keeps"),
        ({"cross_replace": "0.2"}, ValueError, "in \\[0, 1\\]"),
        ({"dense": True, "mask": left_half(), "combine": "or"}, ValueError, "finds no mask"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_computed(
    tiny_editor: Editor, tiny_base: Base, options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        tiny_editor.edit(tiny_base, EDIT, **options)


def test_a_base_without_sparse_steps_says_how_it_can_be_edited(reference_editor: Editor, reference_base: Base) -> None:
    with pytest.raises(ValueError, match="dense=True"):
        reference_editor.edit(reference_base, EDIT)


def test_it_visits_what_a_sparse_edit_of_the_base_visits(tiny_editor_with: Callable[..., Editor]) -> None:
    editor = tiny_editor_with(stride=2)
    base = editor.generate(PROMPT, **arguments(num_inference_steps=8))
    edit = editor.edit(base, EDIT, dense=True)
    assert edit.report.dense_steps == len(base.visits) == 4
