"""The editor with other pipelines than Stable Diffusion's own, and with loops that are not of one call a step."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from test_editor import CAT, CONFIG, DOG, STEPS, generate, load_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fisedit_compile import Editor

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_loop_of_more_steps_than_were_asked_for() -> None:
    """Heun's scheduler evaluates the U-Net twice a step; shares of the steps are of those that are made."""
    editor = Editor(load_pipeline("HeunDiscreteScheduler"), {**CONFIG, "dense_steps": 0.4, "cross_replace": 0.6})
    base = generate(editor)
    assert (base.num_inference_steps, base.dense_steps) == (2 * STEPS - 1, 4)
    edit = editor.edit(base, DOG)
    assert (edit.report.dense_steps, edit.report.sparse_steps) == (4, 5)
    assert edit.report.background_identical


def test_a_loop_that_starts_from_a_picture() -> None:
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**load_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    editor = Editor(pipe, {**CONFIG, "dense_steps": 0.4})
    picture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    base = editor.generate(CAT, image=picture, strength=0.5, num_inference_steps=10, guidance_scale=5.0)
    assert (base.num_inference_steps, base.dense_steps) == (5, 2)
    edit = editor.edit(base, DOG)
    assert (edit.report.dense_steps, edit.report.sparse_steps) == (2, 3)
    assert edit.report.background_identical


def test_a_controlnet() -> None:
    torch.manual_seed(0)
    pipe = load_pipeline()
    # The demo model's pictures are four times as wide as its latents: one halving less than the usual.
    controlnet = diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32, 96))
    for parameter in controlnet.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)  # a new one adds nothing
    pipe = diffusers.StableDiffusionControlNetPipeline(**pipe.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)
    editor = Editor(pipe, CONFIG)
    base = generate(editor, image=torch.rand(1, 3, 128, 128))
    edit = editor.edit(base, DOG)
    assert edit.report.background_identical
    assert not torch.equal(edit.latents, base.latents)
    assert edit.report.macs["ratio"] > 1


def test_perturbed_attention_guidance_is_refused_unless_it_is_off() -> None:
    pipe = diffusers.StableDiffusionPAGPipeline(**load_pipeline().components)
    pipe.set_progress_bar_config(disable=True)
    editor = Editor(pipe, CONFIG)
    for scale in ({}, {"pag_scale": 3.0}):
        with pytest.raises(ValueError, match="pass pag_scale=0"):
            generate(editor, **scale)
    base = generate(editor, pag_scale=0.0)
    assert editor.edit(base, DOG).report.background_identical


def sdxl() -> Any:
    """A small SDXL: two text encoders, size and crop in the time embedding; weights are random."""
    demo = load_pipeline()
    known = demo.text_encoder.config
    text = CLIPTextConfig(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        num_hidden_layers=2,
        projection_dim=16,
        vocab_size=known.vocab_size,
        max_position_embeddings=known.max_position_embeddings,
        eos_token_id=known.eos_token_id,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        norm_num_groups=4,
        attention_head_dim=2,
        use_linear_projection=True,
        cross_attention_dim=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=demo.vae,
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=demo.tokenizer,
        tokenizer_2=demo.tokenizer,
        unet=unet.eval(),
        scheduler=demo.scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    "arguments",
    [{}, {"guidance_scale": 1.0}, {"guidance_rescale": 0.7, "num_images_per_prompt": 2}, {"denoising_end": 0.8}],
    ids=str,
)
def test_sdxl(arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    editor = Editor(sdxl(), CONFIG)
    base = generate(editor, **arguments)
    mask = torch.zeros(32, 32)
    mask[8:20, 4:14] = 1
    edit = editor.edit(base, DOG, mask=mask)
    assert edit.report.background_identical
    assert not torch.equal(edit.latents, base.latents)
    assert editor.edit(base, DOG).report.mask_source == "found"
