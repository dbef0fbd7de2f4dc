"""Stable Diffusion pipelines of the true shapes with random weights: what a picture costs depends on shapes alone.

The pictures that come out mean nothing, so masks have to be given to their edits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from fisedit_compile.architectures import ARCHITECTURES, PROMPT_TOKENS, build_unet

#: Name on the command line -> scheduler and its options beside Stable Diffusion's noise schedule.
SCHEDULERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    "dpm++2m": (DPMSolverMultistepScheduler, {"steps_offset": 1}),
    "euler": (EulerDiscreteScheduler, {"steps_offset": 1}),
}

_TINY_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
_SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}

#: Width, layers, heads and activation of the text encoders: CLIP ViT-L for SD 1, OpenCLIP ViT-H less a layer for SD 2,
#: and both CLIP ViT-L and OpenCLIP ViT-bigG for SDXL.
_TEXT = {
    "tiny": [(32, 2, 4, "gelu")],
    "tiny-sd15": [(32, 2, 4, "quick_gelu")],
    "tiny-sdxl": [(16, 2, 4, "quick_gelu"), (16, 2, 4, "gelu")],
    "sd15": [(768, 12, 12, "quick_gelu")],
    "sd2": [(1024, 23, 16, "gelu")],
    "sdxl": [(768, 12, 12, "quick_gelu"), (1280, 32, 20, "gelu")],
}


def random_pipeline(
    arch: str, *, size: int, words: Sequence[str], scheduler: str, device: torch.device, dtype: torch.dtype
) -> Any:
    """A pipeline whose parts have the shapes of the named architecture, without safety checker, and silent.

    Args:
        arch: a key of :data:`fisedit_compile.architectures.ARCHITECTURES`.
        size: of the square image, in pixels.
        words: prompts whose words the tokenizer has to know; any other word is unknown to it.
        scheduler: a key of :data:`SCHEDULERS`.
        device, dtype: of all parts. On CUDA they lie in ``channels_last``, which cuDNN prefers.

    Raises:
        ValueError: an architecture or a scheduler that is not known.
    """
    if scheduler not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {scheduler!r}; known are {', '.join(SCHEDULERS)}")
    unet = build_unet(arch, device=device, dtype=dtype)
    tokenizer = word_tokenizer(words)
    encoders = [_text_encoder(tokenizer, shape, arch, second=i == 1) for i, shape in enumerate(_TEXT[arch])]
    parts: dict[str, Any] = {
        "vae": random_vae(size, tiny=arch.startswith("tiny")),
        "text_encoder": encoders[0],
        "tokenizer": tokenizer,
        "scheduler": _scheduler(scheduler, arch),
    }
    if len(encoders) == 2:
        pipe = StableDiffusionXLPipeline(
            unet=unet, text_encoder_2=encoders[1], tokenizer_2=tokenizer, add_watermarker=False, **parts
        )
    else:
        pipe = StableDiffusionPipeline(
            unet=unet, safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
        )
    pipe.set_progress_bar_config(disable=True)
    pipe.to(device, dtype)
    if device.type == "cuda":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def random_vae(size: int, *, tiny: bool) -> AutoencoderKL:
    """An autoencoder of Stable Diffusion's shape, or a much smaller one that scales pictures alike."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=size,
        **(_TINY_VAE if tiny else _SD_VAE),
    )
    return vae.eval().requires_grad_(False)


def word_tokenizer(prompts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A word a token, prompts padded to 77 tokens as CLIP's."""
    words = sorted({word for prompt in prompts for word in prompt.split()})
    # CLIPTextModel reads an end mark of id 2 as a legacy flag, so <unk> takes that id.
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<bos>", "<unk>", "<eos>", *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(token, vocabulary[token]) for token in ("<bos>", "<eos>")]
    )
    special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=PROMPT_TOKENS, **special)


def _text_encoder(
    tokenizer: PreTrainedTokenizerFast, shape: tuple[int, int, int, str], arch: str, *, second: bool
) -> CLIPTextModel:
    width, layers, heads, activation = shape
    pooled = ARCHITECTURES[arch].get("projection_class_embeddings_input_dim", width)
    time_ids = 6 * ARCHITECTURES[arch].get("addition_time_embed_dim", 0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer) if arch.startswith("tiny") else 49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        max_position_embeddings=PROMPT_TOKENS,
        projection_dim=pooled - time_ids if second else width,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    encoder = (CLIPTextModelWithProjection if second else CLIPTextModel)(config)
    return encoder.eval().requires_grad_(False)


def _scheduler(name: str, arch: str) -> Any:
    kind, options = SCHEDULERS[name]
    return kind(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        # SD 2.1 at 768 predicts the velocity.
        prediction_type="v_prediction" if arch == "sd2" else "epsilon",
        **options,
    )
