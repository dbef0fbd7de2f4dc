"""The demo model's parts, untrained, and its export as a diffusers pipeline folder."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from .captions import MAX_WORDS
from .scene import CANVAS
from .vocabulary import words

LATENT_CHANNELS = 4
TEXT_WIDTH = 192
MAX_TOKENS = MAX_WORDS + 2


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level, lower-casing, `<bos> words <eos>`, at most 32 tokens; padding is `<pad>`."""
    # CLIPTextModel reads an end mark of id 2 as a legacy flag, so <unk> takes that id.
    vocabulary = {token: i for i, token in enumerate(("<pad>", "<bos>", "<unk>", "<eos>", *words()))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(t, vocabulary[t]) for t in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=MAX_TOKENS,
    )


def build_text_encoder(tokenizer: PreTrainedTokenizerFast) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=TEXT_WIDTH,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_vae() -> AutoencoderKL:
    """An autoencoder whose latents have 4 channels and a quarter of the picture's side; 1.6 M parameters."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        sample_size=CANVAS,
        mid_block_add_attention=False,
        scaling_factor=1.0,  # the latents are normalised into the weights: see `normalise_latents`
    )


def build_unet() -> UNet2DConditionModel:
    """A small U-Net with Stable Diffusion's layout of blocks; 11.5 M parameters, 19.6 GMACs a sample."""
    return UNet2DConditionModel(
        sample_size=CANVAS // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 96, 128, 128),
        layers_per_block=2,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 3, 4, 4),  # diffusers' name for the number of heads
    )


def build_scheduler() -> DDIMScheduler:
    """A scheduler with v-prediction and more noise than Stable Diffusion's.

    With Stable Diffusion's beta_end of 0.012 the last timestep still shows the layout of these smooth latents, and the
    model learns to read the layout there instead of in the words.
    """
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.03,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # trailing spacing does not read it, but diffusers warns about any other value
    )


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Fold a shift and a scale of each latent channel into the 1x1 convolutions around it: mean 0, std 1.

    `mean` and `std` are `[LATENT_CHANNELS]`, measured on `vae`. What the VAE reconstructs does not change.
    """
    encode, decode = vae.quant_conv, vae.post_quant_conv
    decode.bias += decode.weight[:, :, 0, 0] @ mean
    decode.weight *= std[None, :, None, None]
    encode.bias[:LATENT_CHANNELS] -= mean
    encode.bias[:LATENT_CHANNELS] /= std
    encode.weight[:LATENT_CHANNELS] /= std[:, None, None, None]
    encode.bias[LATENT_CHANNELS:] -= 2 * std.log()  # the log-variance of each channel


def build_pipeline(
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: PreTrainedTokenizerFast,
    unet: UNet2DConditionModel,
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def export_pipeline(pipe: StableDiffusionPipeline, folder: Path) -> None:
    """Save the pipeline as safetensors, in a form that all supported versions of the libraries load alike."""
    pipe.save_pretrained(folder, safe_serialization=True)
    # transformers 5 renamed this class and keeps the old name as an alias: that loads in every version.
    _edit_json(folder / "model_index.json", tokenizer=["transformers", "PreTrainedTokenizerFast"])
    save_tokenizer(pipe.tokenizer, folder / "tokenizer")
    # transformers 5 loads in the dtype named here, diffusers in float32 unless told: let both do the same.
    _edit_json(folder / "text_encoder" / "config.json", dtype="float32")


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save it under the class's name that all supported versions of transformers know."""
    tokenizer.save_pretrained(folder)
    _edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values, indent=2) + "\n")
