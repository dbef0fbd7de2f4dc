"""Edits that visit some steps of their base: which ones, by which schedulers, and what stays exact all the same."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given
from hypothesis import strategies as st
from support.pipelines import EDIT, PROMPT, tiny_pipeline

from fisedit_compile import Editor, MaskError
from fisedit_compile.editing.stride import visit, visited_steps

SCHEDULERS = [
    DDIMScheduler(clip_sample=False, steps_offset=1),
    DDIMScheduler(clip_sample=False, timestep_spacing="trailing", steps_offset=1),
    DPMSolverMultistepScheduler(steps_offset=1),
    DPMSolverMultistepScheduler(use_karras_sigmas=True, steps_offset=1),
    EulerDiscreteScheduler(steps_offset=1),
    UniPCMultistepScheduler(steps_offset=1),
    DEISMultistepScheduler(steps_offset=1),
]
STEPS = 8


def names(scheduler: Any) -> str:
    return type(scheduler).__name__


def editor_with(scheduler: Any, **config: Any) -> Editor:
    return Editor(tiny_pipeline(scheduler=scheduler), {"dense_steps": 0.25, **config})


@pytest.fixture(scope="module")
def editors() -> dict[int | str, Editor]:
    """One for each stride, of which each test sets the scheduler."""
    return {stride: editor_with(SCHEDULERS[0], stride=stride) for stride in (1, 2, "auto")}


@pytest.fixture(scope="module")
def editor_without_words() -> Editor:
    """One whose U-Net does not read the text; of strides of two."""
    editor = editor_with(SCHEDULERS[0], stride=2, dense_steps=0.5, cross_replace=0.0)
    for name, layer in editor.unet.unet.named_modules():
        if name.endswith("attn2.to_out.0"):
            layer.weight.zero_()
    return editor


def left_half() -> torch.Tensor:
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :8] = True
    return mask


def generate(editor: Editor, **arguments: Any) -> Any:
    return editor.generate(PROMPT, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(3), **arguments)


@given(st.integers(1, 60), st.integers(1, 9))
def test_the_first_and_the_last_step_are_visited_and_gaps_are_about_a_stride(steps: int, stride: int) -> None:
    visits = visited_steps(steps, stride)
    assert visits[0] == 0
    assert visits[-1] == steps - 1
    gaps = [later - earlier for earlier, later in pairwise(visits)]
    assert all(gap == stride for gap in gaps[1:])
    assert all(stride / 2 <= gap <= 1.5 * stride for gap in gaps[:1] if steps > stride)
    if stride == 1:
        assert visits == tuple(range(steps))


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=names)
def test_a_scheduler_that_visits_some_steps_reaches_what_it_reaches_by_all(scheduler: Any) -> None:
    """The model predicts what leads straight to one picture, which steps of any length reach."""
    picture = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    visits = visited_steps(20, 3)
    whole, some = (type(scheduler).from_config(scheduler.config) for _ in range(2))
    whole.set_timesteps(20)
    visit(some, 20, visits, then=lambda: None)
    some.set_timesteps(len(visits))
    assert torch.equal(some.timesteps, whole.timesteps[list(visits)])
    alphas = torch.as_tensor(whole.alphas_cumprod, dtype=torch.float64)
    ends = []
    for each in (whole, some):
        latents = torch.ones(1, 4, 4, 4, dtype=torch.float64) * each.init_noise_sigma
        for timestep in each.timesteps:
            seen = each.scale_model_input(latents, timestep)
            alpha = alphas[int(timestep)]
            noise = (seen - alpha.sqrt() * picture) / (1 - alpha).sqrt()
            latents = each.step(noise, timestep, latents, return_dict=False)[0]
        ends.append(latents)
    assert torch.allclose(*ends, atol=1e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=names)
def test_outside_the_mask_an_edit_is_its_base_whatever_the_stride(
    editors: dict[int | str, Editor], scheduler: Any
) -> None:
    for stride in (1, 2):
        editor = editors[stride]
        editor.pipe.scheduler = scheduler
        base = generate(editor)
        edit = editor.edit(base, EDIT, mask=left_half())
        assert (edit.report.dense_steps, edit.report.sparse_steps) == (0, {1: 8, 2: 4}[stride])
        assert len(base.calls) == {1: 8, 2: 4}[stride]
        outside = ~edit.mask[:, None].expand_as(base.latents)
        assert torch.equal(edit.latents[outside], base.latents[outside])
        assert not torch.equal(edit.latents[~outside], base.latents[~outside])
        same = editor.edit(base, EDIT, mask=left_half())
        assert torch.equal(same.latents, edit.latents)


@pytest.mark.parametrize("scheduler", SCHEDULERS, ids=names)
def test_words_that_change_nothing_give_the_base_in_the_dense_steps_too(
    editor_without_words: Editor, scheduler: Any
) -> None:
    """The longer steps are corrected by what they miss of the base, so that only words make a difference."""
    editor_without_words.pipe.scheduler = scheduler
    base = generate(editor_without_words)
    with pytest.raises(MaskError):
        editor_without_words.edit(base, EDIT)


@pytest.mark.parametrize(
    ("scheduler", "arguments", "reason"),
    [
        (PNDMScheduler(skip_prk_steps=True, steps_offset=1), {}, "PNDMScheduler cannot make longer steps"),
        (
            EulerAncestralDiscreteScheduler(steps_offset=1),
            {},
            "EulerAncestralDiscreteScheduler cannot make longer steps",
        ),
        (DDIMScheduler(clip_sample=False, steps_offset=1), {"eta": 1.0}, "DDIMScheduler adds noise at each step"),
        (DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", steps_offset=1), {}, "adds noise at each step"),
    ],
)
def test_a_scheduler_that_cannot_is_named_and_visits_all_by_default(
    editors: dict[int | str, Editor], scheduler: Any, arguments: dict[str, Any], reason: str
) -> None:
    for stride in (2, "auto"):
        editors[stride].pipe.scheduler = scheduler
    with pytest.raises(ValueError, match=f"stride=2: .*{reason}.*pass stride=1 or 'auto'"):
        generate(editors[2], **arguments)
    editor = editors["auto"]
    base = generate(editor, **arguments)
    assert base.visits_all
    assert editor.edit(base, EDIT, mask=left_half()).latents.isfinite().all()


def test_a_stride_that_leaves_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="stride=8 for a base of 8 steps: at most 7"):
        generate(editor_with(SCHEDULERS[0], stride=8))


@pytest.mark.parametrize("stride", [0, -1, 1.5, "two", True])
def test_what_is_no_stride_is_refused(stride: Any) -> None:
    with pytest.raises(ValueError, match="stride"):
        Editor(tiny_pipeline(), {"stride": stride})
