"""The editor with other pipelines than Stable Diffusion's own, and with loops that are not of one call a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from support.kinds import KINDS
from support.pipelines import CONFIG, EDIT, PROMPT, STEPS, arguments, generate, left_half, tiny_pipeline
from support.pipelines_sdxl import tiny_sdxl

from fisedit_compile import Editor, SparseUNet, sparsify
from fisedit_compile.editing.photo import encode
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

ADAPTER = "SD StableDiffusionAdapterPipeline + T2I-Adapter"


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def by_shares() -> SparseUNet:
    """A U-Net that is captured once, with dense and controlled steps that are shares of all."""
    return sparsify(tiny_pipeline().unet, {"dense_steps": 0.4, "cross_replace": 0.6})


def test_a_loop_of_more_steps_than_were_asked_for(by_shares: SparseUNet) -> None:
    """Heun's scheduler evaluates the U-Net twice a step; shares of the steps are of those that are made."""
    editor = Editor(tiny_pipeline(unet=by_shares, scheduler=diffusers.HeunDiscreteScheduler(steps_offset=1)))
    base = generate(editor)
    assert (base.num_inference_steps, base.dense_steps) == (2 * STEPS - 1, 3)
    edit = editor.edit(base, EDIT)
    assert (edit.report.dense_steps, edit.report.sparse_steps) == (3, 4)
    assert edit.report.background_identical


def test_a_loop_that_starts_from_a_picture(by_shares: SparseUNet) -> None:
    editor = Editor(quiet(diffusers.StableDiffusionImg2ImgPipeline(**tiny_pipeline(unet=by_shares).components)))
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    base = generate(editor, image=picture, strength=0.5, num_inference_steps=10)
    assert (base.num_inference_steps, base.dense_steps) == (5, 2)
    edit = editor.edit(base, EDIT)
    assert (edit.report.dense_steps, edit.report.sparse_steps) == (2, 3)
    assert edit.report.background_identical


def test_a_controlnet() -> None:
    torch.manual_seed(0)
    pipe = tiny_pipeline()
    # The pictures are twice as wide as the latents, where the usual ones are eight times.
    controlnet = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    for parameter in controlnet.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)  # a new one adds nothing
    editor = Editor(
        quiet(diffusers.StableDiffusionControlNetPipeline(**pipe.components, controlnet=controlnet)), CONFIG
    )
    control = torch.rand(1, 3, 32, 32)
    base = generate(editor, image=control)
    edit = editor.edit(base, EDIT, left_half())
    assert edit.report.background_identical
    assert not torch.equal(edit.latents, base.latents)
    assert edit.report.macs["ratio"] > 1
    inverted = editor.invert(photo(), PROMPT, num_inference_steps=4, guidance_scale=5.0, image=control)
    assert editor.edit(inverted, EDIT, left_half()).report.background_identical


@pytest.fixture(scope="module")
def with_adapter() -> Editor:
    """An editor of which each test sets the scheduler."""
    return Editor(KINDS[ADAPTER].build(), {**CONFIG, "stride": 2})


@pytest.mark.filterwarnings("ignore:.*decode_latents:FutureWarning")  # the pipeline itself calls it
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_t2i_adapter_whose_pipeline_has_no_callback(with_adapter: Editor, scheduler: str) -> None:
    """Strides, rounds and photos: each sets the scheduler's steps, or what these lead to."""
    kind, editor, pipe, mask = KINDS[ADAPTER], with_adapter, with_adapter.pipe, left_half()
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    base = generate(editor, **kind.arguments, num_inference_steps=8)
    assert len(base.visits) < 8
    assert_close(base.latents, pipe(PROMPT, output_type="latent", **kind.arguments, **eight_steps()).images)
    edit = editor.edit(base, EDIT, mask)
    further = editor.edit(edit, "an apple on the left", ~mask)
    assert torch.equal(further.latents[..., :8], edit.latents[..., :8])
    assert editor.edit(base, EDIT).report.background_identical
    inverted = editor.invert(photo(), PROMPT, num_inference_steps=8, guidance_scale=5.0, **kind.arguments)
    assert_close(inverted.latents, encode(pipe, [photo()], torch.float32))
    assert editor.edit(inverted, EDIT, mask).report.background_identical
    with pytest.raises(ValueError, match=r"takes no callback_on_step_end: leave .* out"):
        generate(editor, **kind.arguments, callback_on_step_end=print)


def eight_steps() -> dict[str, Any]:
    return arguments(num_inference_steps=8)


def test_perturbed_attention_guidance_is_refused_unless_it_is_off(own_pipeline: Callable[..., Any]) -> None:
    editor = Editor(quiet(diffusers.StableDiffusionPAGPipeline(**own_pipeline().components)))
    for scale in ({}, {"pag_scale": 3.0}):
        with pytest.raises(ValueError, match="pass pag_scale=0"):
            generate(editor, **scale)
    base = generate(editor, pag_scale=0.0)
    assert editor.edit(base, EDIT, left_half()).report.background_identical


@pytest.fixture(scope="module")
def sdxl() -> Editor:
    """An editor of a small SDXL: two text encoders, size and crop in the time embedding; weights are random."""
    return Editor(tiny_sdxl(), CONFIG)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"guidance_scale": 1.0}, {"guidance_rescale": 0.7, "num_images_per_prompt": 2}, {"denoising_end": 0.8}],
    ids=str,
)
def test_sdxl(sdxl: Editor, arguments: dict[str, Any]) -> None:
    base = generate(sdxl, **{"num_inference_steps": 5, **arguments})
    edit = sdxl.edit(base, EDIT, left_half())
    assert edit.report.background_identical
    assert not torch.equal(edit.latents, base.latents)
    assert sdxl.edit(base, EDIT).report.mask_source == "found"


def photo() -> Image.Image:
    colours = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((32, 32), Image.Resampling.BICUBIC)


def test_sdxl_edits_a_picture_that_it_did_not_draw(sdxl: Editor) -> None:
    base = sdxl.invert(photo(), PROMPT, num_inference_steps=4, guidance_scale=5.0, prompt_2="an apple")
    edit = sdxl.edit(base, EDIT, left_half(), prompt_2="a dog")
    assert edit.report.background_identical
    assert np.array_equal(np.array(edit.image)[:, 28:], np.array(photo())[:, 28:])


def test_the_second_prompt_of_sdxl_may_change_alone(sdxl: Editor) -> None:
    base = generate(sdxl, prompt_2="an apple on the left")
    changes = {"prompt_2": EDIT, "negative_prompt_2": "a cat"}
    edit = sdxl.edit(base, PROMPT, dense=True, cross_replace=0, background="latents", **changes)
    assert_close(edit.latents, sdxl.pipe(PROMPT, output_type="latent", **arguments(**changes)).images)
    assert sdxl.edit(base, PROMPT, left_half(), **changes).report.background_identical
