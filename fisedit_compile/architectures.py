"""U-Nets with the shapes of Stable Diffusion and random weights, and inputs for them.

What an operation costs depends on its shapes alone, so nothing has to be downloaded to count or time a model.
``height`` and ``width`` are those of the *image* in pixels, as in diffusers' pipelines; the U-Net sees latents of an
eighth of that.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from diffusers import UNet2DConditionModel

#: How many image pixels a latent pixel is wide in the autoencoders of Stable Diffusion 1, 2 and XL.
VAE_SCALE_FACTOR = 8

#: The number of tokens that CLIP's tokenizer pads a prompt to.
PROMPT_TOKENS = 77

_SD_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_SD_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
_SDXL_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
_SDXL_UP = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")
_TINY: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64, 64),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}

#: The arguments of ``diffusers.UNet2DConditionModel`` for each name; those left out have diffusers' defaults, which are
#: those of SD 1. ``sd15``, ``sd2`` (2.1 at 768) and ``sdxl`` (base 1.0) are the published models. The ``tiny`` ones
#: have the same kinds of blocks at three resolutions, and 2 to 3 M parameters.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny": {
        **_TINY,
        "down_block_types": _SD_DOWN,
        "up_block_types": _SD_UP,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
    },
    "tiny-sd15": {**_TINY, "down_block_types": _SD_DOWN, "up_block_types": _SD_UP, "attention_head_dim": 4},
    "tiny-sdxl": {
        **_TINY,
        "down_block_types": _SDXL_DOWN,
        "up_block_types": _SDXL_UP,
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 1, 2),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": _SDXL_DOWN,
        "up_block_types": _SDXL_UP,
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2, 10),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 6 * 256 + 1280,
    },
}


def build_unet(
    arch: str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> UNet2DConditionModel:
    """A U-Net of the named architecture with random weights, in eval mode; its parameters require no gradients.

    Weights are normal with variance 1 / fan-in and norms scale by about 1, so that activations keep their size and
    are finite in fp16. The same ``seed`` gives the same weights on the same kind of device. With ``device="meta"``
    the parameters have shapes but no values, and nothing is computed.

    Raises:
        ValueError: ``arch`` is not in :data:`ARCHITECTURES`.
    """
    if arch not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(ARCHITECTURES)}")
    with torch.device("meta"):  # spends no time on torch's own initial values, which would be overwritten
        unet = UNet2DConditionModel(**ARCHITECTURES[arch])
    torch.nn.Module.to(unet, dtype)  # diffusers' own ``to`` warns of modules to keep in fp32, of which there are none
    unet.eval().requires_grad_(False)
    if torch.device(device).type == "meta":
        return unet
    if any(True for _ in unet.buffers()):
        raise AssertionError(f"{arch} has buffers, which to_empty leaves uninitialised")
    unet.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in unet.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=prod(parameter.shape[1:]) ** -0.5, generator=generator)
        else:  # scales of norms and biases, not exactly 1 and 0: then code that leaves one out gives another result
            parameter.normal_(float(name.endswith("weight")), 0.1, generator=generator)
    return unet


def latent_size(height: int, width: int, *, scale_factor: int = VAE_SCALE_FACTOR) -> tuple[int, int]:
    """The (height, width) of the latents of an image of ``height`` x ``width`` pixels.

    Raises:
        ValueError: a size is not a positive multiple of ``scale_factor``.
    """
    for name, size in (("height", height), ("width", width)):
        if size <= 0 or size % scale_factor:
            nearest = max(round(size / scale_factor), 1) * scale_factor
            raise ValueError(
                f"{name} is {size} pixels, which is not a positive multiple of {scale_factor}; "
                f"{nearest} is the nearest that the model takes"
            )
    return height // scale_factor, width // scale_factor


def unet_inputs(
    unet: UNet2DConditionModel,
    *,
    batch: int,
    height: int,
    width: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    scale_factor: int = VAE_SCALE_FACTOR,
) -> tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], dict[str, Any]]:
    """Random ``args`` and ``kwargs`` of a call ``unet(*args, **kwargs)`` for images of ``height`` x ``width`` pixels.

    Args:
        unet: the U-Net; its config says how wide the inputs are.
        batch: samples of the call.
        height: height of the images, in pixels.
        width: width of the images, in pixels.
        device: where the inputs are; None for the U-Net's device.
        dtype: the dtype of the inputs but the timestep; None for the U-Net's.
        seed: decides the values; they are the same on every device.
        scale_factor: how many image pixels a latent pixel is wide.

    Returns:
        ``(sample, timestep, encoder_hidden_states)`` of shapes ``[batch, channels, height / 8, width / 8]``, ``[]``
        (int64) and ``[batch, 77, cross_attention_dim]``; and ``{}``, or for SDXL ``added_cond_kwargs`` with
        ``text_embeds`` ``[batch, pooled width]`` and ``time_ids`` ``[batch, 6]``.

    Raises:
        ValueError: ``batch`` is not positive, or a size is not a positive multiple of ``scale_factor``.
    """
    if batch <= 0:
        raise ValueError(f"batch is {batch}, it must be positive")
    size = latent_size(height, width, scale_factor=scale_factor)
    device, dtype = device or unet.device, dtype or unet.dtype
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    sample = random(batch, unet.config["in_channels"], *size)
    text = random(batch, PROMPT_TOKENS, unet.config["cross_attention_dim"])
    args = (sample, torch.tensor(500, device=device), text)
    if unet.config["addition_embed_type"] != "text_time":
        return args, {}
    time_ids = 6 * unet.config["addition_time_embed_dim"]
    pooled = random(batch, unet.config["projection_class_embeddings_input_dim"] - time_ids)
    # the six numbers of SDXL: original size, top left corner of the crop, target size
    ids = torch.tensor([height, width, 0, 0, height, width], device=device, dtype=dtype).repeat(batch, 1)
    return args, {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}
