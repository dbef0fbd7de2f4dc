"""A Stable Diffusion XL pipeline that is as small as one can be."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from support.pipelines import tiny_pipeline
from support.unets import MICRO
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def tiny_sdxl_unet(**changes: Any) -> Any:
    """Its U-Net: size and crop in the time embedding, linear projections, text of two encoders."""
    words = 8  # the width of the small text encoder
    config = {
        **MICRO,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 2 * words,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + words,
        **changes,
    }
    return diffusers.UNet2DConditionModel(**config).eval()


def tiny_sdxl(**parts: Any) -> Any:
    """Pictures of 32x32 from latents of 16x16, random weights, two text encoders; ``parts`` replace its own."""
    small = tiny_pipeline()
    known = small.text_encoder.config
    text = CLIPTextConfig(**{**known.to_dict(), "projection_dim": known.hidden_size})
    own = {
        "vae": small.vae,
        "text_encoder": CLIPTextModel(text).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(text).eval(),
        "tokenizer": small.tokenizer,
        "tokenizer_2": small.tokenizer,
        "unet": tiny_sdxl_unet(),
        "scheduler": small.scheduler,
    }
    torch.manual_seed(0)
    pipe = diffusers.StableDiffusionXLPipeline(**{**own, **parts})
    pipe.set_progress_bar_config(disable=True)
    return pipe
