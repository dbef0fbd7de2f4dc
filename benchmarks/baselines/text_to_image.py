"""Text to image (SDTP): the picture is made again from the new words.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022; the pipeline is
diffusers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from baselines.method import Method
from baselines.models import GUIDANCE, TARGET, Kit


class TextToImage(Method):
    title = "SDTP (text to image)"
    source = "Rombach et al. 2022; diffusers"

    def __init__(self, kit: Kit) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionPipeline, kit.unet())

    @property
    def unet(self) -> torch.nn.Module:
        unet: torch.nn.Module = self.pipe.unet
        return unet

    def make(self) -> Any:
        return self.pipe(
            TARGET,
            height=self.kit.size,
            width=self.kit.size,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=self.kit.generator(),
        ).images[0]


class CompiledTextToImage(TextToImage):
    """The same under ``torch.compile``, with CUDA graphs where there are any: what every speed-up is to be held to."""

    title = "SDTP, torch.compile"
    source = "Rombach et al. 2022; diffusers and torch.compile"

    def __init__(self, kit: Kit) -> None:
        super().__init__(kit)
        if not kit.counting:
            # With CUDA graphs, as FISEdit has them.
            mode = "reduce-overhead" if kit.device.type == "cuda" else "default"
            self.pipe.unet = torch.compile(self.pipe.unet, mode=mode)

    def prepare(self, steps: int) -> None:
        if not self.kit.counting:
            self.run(2)  # compiles; on CUDA a warm-up follows, which records graphs

    def close(self) -> None:
        torch.compiler.reset()  # forget the code, and with it the memory, of this U-Net
