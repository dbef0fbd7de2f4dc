"""A Stable Diffusion pipeline that is as small as one can be, and an editor's use of it."""

from __future__ import annotations

from typing import Any

import torch
from support.unets import UNets

from fisedit_compile import Base, Editor

PROMPT, EDIT = "a cat on the left", "a dog on the left"
STEPS = 4
#: A controlled, a dense and two sparse steps, though a random model finds large masks.
CONFIG: dict[str, Any] = {"dense_steps": 2, "cross_replace": 0.25, "dense_above": 1.0}

_SPECIAL = ("<bos>", "<eos>", "<pad>", "<unk>")
_WORDS = (*_SPECIAL, "a", "an", "cat", "dog", "on", "the", "left", "apple")


def tiny_pipeline(*, sparse_decoder: bool = False, **parts: Any) -> Any:
    """Pictures of 32x32 from latents of 16x16, random weights, a few words.

    Args:
        sparse_decoder: let editors capture the decoder, which takes a second with each new pipeline.
        parts: replace the pipeline's own.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {word: i for i, word in enumerate(_WORDS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(token, words[token]) for token in _SPECIAL[:2]]
    )
    text = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    own = {
        "unet": UNets.fresh("micro", torch.float32),
        "vae": AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        ).eval(),
        "text_encoder": CLIPTextModel(text).eval(),
        "tokenizer": PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            model_max_length=8,
            bos_token="<bos>",
            eos_token="<eos>",
            pad_token="<pad>",
            unk_token="<unk>",
        ),
        "scheduler": DDIMScheduler(clip_sample=False, steps_offset=1),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
    pipe = StableDiffusionPipeline(**{**own, **parts})
    if not sparse_decoder:
        pipe.vae.enable_slicing()  # of batches; an editor leaves such a decoder alone
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(**changes: Any) -> dict[str, Any]:
    """Those of a generation, of the pipeline's own call or the editor's; each time with a generator of its own."""
    seed = torch.Generator().manual_seed(3)
    return {"num_inference_steps": STEPS, "guidance_scale": 5.0, "generator": seed, **changes}


def generate(editor: Editor, prompt: Any = PROMPT, **changes: Any) -> Base:
    """A base of ``editor`` by :func:`arguments`."""
    return editor.generate(prompt, **arguments(**changes))


def left_half() -> torch.Tensor:
    """A mask, at latent resolution."""
    mask = torch.zeros(16, 16, dtype=torch.bool)
    mask[:, :8] = True
    return mask
