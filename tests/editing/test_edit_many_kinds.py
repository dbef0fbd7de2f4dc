"""Edits made together with each kind of pipeline: equal to those alone, or refused by name.

``FISEDIT_ALL_CELLS=1`` tries all kinds of docs/support.md.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from support.kinds import KINDS, PICTURE
from support.pipelines import left_half

from fisedit_compile import Base, BaseMismatchError, Editor, EditRequest

pytestmark = pytest.mark.usefixtures("one_thread")

CHOSEN = (
    *("SD StableDiffusionPipeline + IP-Adapter", "SD StableDiffusionControlNetPipeline"),
    *("SD StableDiffusionInstructPix2PixPipeline", "SD StableDiffusionImg2ImgPipeline"),
    *("SD StableDiffusionAdapterPipeline + T2I-Adapter", "SD LatentConsistencyModelPipeline"),
    "SDXL StableDiffusionXLPipeline",
)

#: Error of an edit, of what its words change: rounding, by another size of the batch.
TOLERANCE = 1e-3


def generated(editor: Editor, kind: str, prompt: str, seed: int, **changes: Any) -> Base:
    settings = {"num_inference_steps": 5, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(seed)}
    return editor.generate(prompt, **{**settings, **KINDS[kind].arguments, **changes})


@pytest.fixture(scope="module")
def editor_of() -> Callable[[str], Editor]:
    """Makes the editor of a kind, once."""
    return cache(lambda kind: Editor(KINDS[kind].build(), {"dense_above": 1.0}))


@pytest.mark.filterwarnings("ignore:.*(decode_latents|initial images|configuration file):FutureWarning")
@pytest.mark.parametrize("kind", KINDS if os.environ.get("FISEDIT_ALL_CELLS") else CHOSEN)
def test_a_kind_of_pipeline(editor_of: Callable[[str], Editor], kind: str) -> None:
    if KINDS[kind].added == "perturbed attention":
        pytest.skip("it has no bases")
    editor = editor_of(kind)
    cat, dog = generated(editor, kind, "a cat on the left", 3), generated(editor, kind, "a dog on the apple", 4)
    requests = [
        EditRequest(cat, "a dog on the left", left_half()),
        EditRequest(dog, "a cat on the apple"),
        EditRequest(cat, "an apple on the left", ~left_half()),
    ]
    if any(word in kind for word in ("Img2Img", "Inpaint")):
        with pytest.raises(ValueError, match="starts from pictures: make its edits one by one"):
            editor.edit_many(requests)
        return
    if "Adapter" in KINDS[kind].pipeline:
        with pytest.raises(BaseMismatchError, match=r"edit 0: beside the others the U-Net is called with \[6, 4"):
            editor.edit_many(requests)
        return
    for request, got in zip(requests, editor.edit_many(requests), strict=True):
        want = editor.edit(request.base, request.prompt, request.mask)
        assert torch.equal(got.mask, want.mask)
        changed = (want.latents - request.base.latents).norm()
        assert (got.latents - want.latents).norm() <= TOLERANCE * changed
        assert got.report.background_identical


def test_other_pictures_beside_the_words(editor_of: Callable[[str], Editor]) -> None:
    kind = "SD StableDiffusionControlNetPipeline"
    editor = editor_of(kind)
    base = generated(editor, kind, "a cat on the left", 3)
    same, other = (generated(editor, kind, "a cat on the left", 4, image=each) for each in (PICTURE, 1 - PICTURE))
    assert len(editor.edit_many([EditRequest(base, "a dog on the left"), EditRequest(same, "a dog on the left")])) == 2
    with pytest.raises(ValueError, match="edit 1 cannot be made together with edit 0: its image is another Tensor"):
        editor.edit_many([EditRequest(base, "a dog on the left"), EditRequest(other, "a dog on the left")])


def test_a_scheduler_with_a_seed_of_its_own() -> None:
    import diffusers

    pipe = KINDS["SD StableDiffusionPipeline"].build()
    pipe.scheduler = diffusers.DPMSolverSDEScheduler.from_config(pipe.scheduler.config, noise_sampler_seed=0)
    editor = Editor(pipe, {"dense_above": 1.0})
    base = generated(editor, "SD StableDiffusionPipeline", "a cat on the left", 3)
    with pytest.raises(ValueError, match="edit 0: DPMSolverSDEScheduler draws the noise of a whole batch from a seed"):
        editor.edit_many([EditRequest(base, "a dog on the left")] * 2)
    assert editor.edit_many([EditRequest(base, "a dog on the left")])[0].report.made_together == 1
