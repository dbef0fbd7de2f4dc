"""The parts that the methods of Table A1 are built from, with Stable Diffusion's true shapes and random weights.

What a method costs depends on shapes alone, so nothing is downloaded. The pictures that come out mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMInverseScheduler, DDIMScheduler, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from baselines.calls import CountedUNet, NoVAE
from baselines.task import Task
from fisedit_compile.architectures import ARCHITECTURES, PROMPT_TOKENS, build_unet

#: The prompt of the picture and that of its edit. One word differs, as in the paper's edits.
SOURCE, TARGET = "a photo of a cat on a chair", "a photo of a dog on a chair"

#: The guidance scale of every method. It is above 1, so that each guided call has the batch that its paper has.
GUIDANCE = 7.5

_Pipeline = TypeVar("_Pipeline")
_Model = TypeVar("_Model", bound=torch.nn.Module)
_TINY_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}
_SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
#: Width, layers, heads and activation of the text encoders. SD 1 has CLIP ViT-L, SD 2 OpenCLIP ViT-H without its last
#: layer.
_TEXT_ENCODERS = {
    "tiny": (32, 2, 4, "gelu"),
    "tiny-sd15": (32, 2, 4, "quick_gelu"),
    "sd15": (768, 12, 12, "quick_gelu"),
    "sd2": (1024, 23, 16, "gelu"),
}


@dataclass(frozen=True)
class Kit:
    """Makes the parts of a pipeline.

    Args:
        arch: a key of :data:`fisedit_compile.architectures.ARCHITECTURES`; those of SDXL have other pipelines and are
            refused.
        size: side of the square image, in pixels.
        device: where the parts are.
        dtype: the dtype of weights and activations.
        counting: whether U-Nets count instead of computing, see :class:`CountedUNet`; ``device`` must then be the CPU.

    Raises:
        ValueError: an architecture without these pipelines.
    """

    arch: str
    size: int
    device: torch.device
    dtype: torch.dtype
    counting: bool = False
    #: Shared by the rows of one method, such as the base of FISEdit's edits.
    shared: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.arch not in _TEXT_ENCODERS:
            raise ValueError(f"arch is {self.arch!r}: the methods of the table exist for {', '.join(_TEXT_ENCODERS)}")

    @property
    def unet_device(self) -> torch.device:
        """The device that the layers of a U-Net run on."""
        return torch.device("meta") if self.counting else self.device

    def unet(self, in_channels: int = 4) -> UNet2DConditionModel:
        """A new U-Net; inpainting takes one with 9 input channels, InstructPix2Pix one with 8."""
        unet = build_unet(self.arch, device=self.unet_device, dtype=self.dtype)
        if in_channels != unet.config["in_channels"]:
            old = unet.conv_in
            with self.unet_device:
                unet.conv_in = torch.nn.Conv2d(
                    in_channels, old.out_channels, old.kernel_size, padding=old.padding, dtype=self.dtype
                ).requires_grad_(False)
            unet.register_to_config(in_channels=in_channels)
        if self.counting:
            return CountedUNet.of(unet)
        return self._laid_out(unet)

    def _laid_out(self, model: _Model) -> _Model:
        """``model`` in the layout that cuDNN prefers; otherwise eager methods would be slower than they have to be."""
        return model.to(memory_format=torch.channels_last) if self.device.type == "cuda" else model

    @cached_property
    def vae(self) -> AutoencoderKL:
        tiny = self.counting or self.arch.startswith("tiny")
        with torch.device(self.device):
            vae = (NoVAE if self.counting else AutoencoderKL)(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                latent_channels=4,
                sample_size=self.size,
                **(_TINY_VAE if tiny else _SD_VAE),
            )
        return self._laid_out(vae.to(self.dtype).eval().requires_grad_(False))

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        width, layers, heads, activation = _TEXT_ENCODERS[self.arch]
        config = CLIPTextConfig(
            vocab_size=len(self.tokenizer) if self.counting or self.arch.startswith("tiny") else 49408,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=1 if self.counting else layers,
            num_attention_heads=heads,
            hidden_act=activation,
            max_position_embeddings=PROMPT_TOKENS,
            projection_dim=width,
            pad_token_id=self.tokenizer.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )
        with torch.device(self.device):
            encoder = CLIPTextModel(config)
        return encoder.to(self.dtype).eval().requires_grad_(False)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer with one token for each word, which pads to 77 tokens as CLIP's does."""
        words = sorted({*SOURCE.split(), *TARGET.split()})
        # CLIPTextModel reads an end mark of id 2 as a legacy flag, so <unk> takes that id.
        vocabulary = {token: i for i, token in enumerate(("<pad>", "<bos>", "<unk>", "<eos>", *words))}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>", special_tokens=[(token, vocabulary[token]) for token in ("<bos>", "<eos>")]
        )
        special = {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=PROMPT_TOKENS, **special)

    @property
    def scheduler(self) -> DDIMScheduler:
        """Stable Diffusion's noise schedule under DDIM, which every method here has been published with."""
        return DDIMScheduler(**self._schedule)

    @property
    def inverse_scheduler(self) -> DDIMInverseScheduler:
        return DDIMInverseScheduler(**self._schedule)

    @property
    def _schedule(self) -> dict[str, Any]:
        return {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            # SD 2.1 at 768 predicts the velocity.
            "prediction_type": "v_prediction" if ARCHITECTURES[self.arch]["sample_size"] == 96 else "epsilon",
        }

    def pipeline(self, kind: type[_Pipeline], unet: UNet2DConditionModel, **more: Any) -> Any:
        """A pipeline of class ``kind`` around ``unet``, without safety checker, and silent."""
        pipe: Any = kind(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            **{"scheduler": self.scheduler, "safety_checker": None, "feature_extractor": None, **more},
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def image(self) -> Image.Image:
        """The picture to edit: noise."""
        pixels = np.random.default_rng(0).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def mask(self) -> Image.Image:
        """A white square in the middle, a quarter of the picture: for methods whose cost does not depend on it."""
        mask = Image.new("L", (self.size, self.size))
        low, high = self.size // 4, self.size - self.size // 4
        mask.paste(255, (low, low, high, high))
        return mask

    @cached_property
    def task(self) -> Task:
        """The edit that is timed."""
        return Task(SOURCE, TARGET, self.image(), self.mask(), seed=0, guidance=GUIDANCE)
