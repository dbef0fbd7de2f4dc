#!/usr/bin/env python
"""Compares the FISEdit paper's 1,901 GMACs for Stable Diffusion 2.1 at 768x768 with what they may have counted.

    python benchmarks/mac_conventions.py

Source of the figure: Yu et al. 2023, appendix B.2. Everything is counted on the meta device, which takes seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from diffusers import AutoencoderKL
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from fisedit_compile.macs.counter import MacCount, count_macs

#: The paper's figure, in MACs, and the size in pixels and the number of steps that it is for.
PAPER_MACS = 1901e9
SIZE, STEPS = 768, 50

#: How many U-Net calls 50 steps take under PNDM, which takes its second step twice.
PNDM_CALLS = 51

_VAE_CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
#: The text encoder of Stable Diffusion 2: OpenCLIP ViT-H without its last layer.
_TEXT_ENCODER_CONFIG = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "vocab_size": 49408,
}


def once_an_image() -> tuple[int, int]:
    """MACs of the autoencoder's decoder, and of the text encoder for two prompts, one of them empty."""
    with torch.device("meta"), torch.no_grad():
        vae, text = AutoencoderKL(**_VAE_CONFIG).eval(), CLIPTextModel(CLIPTextConfig(**_TEXT_ENCODER_CONFIG)).eval()
        with FlopCounterMode(display=False) as decoder:
            vae.decode(torch.empty(1, 4, SIZE // 8, SIZE // 8))
        with FlopCounterMode(display=False) as encoder:
            text(torch.zeros(2, 77, dtype=torch.long))
    return decoder.get_total_flops() // 2, encoder.get_total_flops() // 2


def candidates(unet: MacCount) -> Iterator[tuple[str, float]]:
    """What the paper may have counted, as pairs of a description and its MACs for one step.

    Args:
        unet: the count of one call with a batch of 2.
    """
    products = unet.by_op["attention"]
    conventions = {
        "all MACs": unet.total,
        "without attention products": unet.without_attention,
        # Older diffusers multiply queries and keys by baddbmm, for which fvcore has no formula of its own.
        "without queries x keys": unet.total - products / 2,
    }
    decoder, encoder = once_an_image()
    for name, macs in conventions.items():
        yield f"U-Net, batch 2, {name}", macs
        yield f"  {PNDM_CALLS} calls in {STEPS} steps", macs * PNDM_CALLS / STEPS
        yield f"  with decoder / {STEPS}", macs + decoder / STEPS
        yield f"  with decoder and text encoder / {STEPS}", macs + (decoder + encoder) / STEPS
    for name, macs in conventions.items():
        yield f"U-Net, batch 1, {name}", macs / 2
    yield "U-Net, batch 2.5, without attention products", 2.5 * unet.without_attention / 2
    yield "decoder, once an image", decoder
    yield "text encoder, once an image", encoder


def main() -> int:
    unet = count_macs("sd2", height=SIZE, width=SIZE, batch=2).dense
    rows = [["", "GMACs", "to 1,901"]]
    for name, macs in candidates(unet):
        rows.append([name, f"{macs / 1e9:,.1f}", f"{macs / PAPER_MACS - 1:+.2%}"])
    print(tabulate(rows, tablefmt="plain", stralign="right", colalign=("left",), disable_numparse=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
