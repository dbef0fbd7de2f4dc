"""Inpainting (SDIP): a U-Net fine-tuned to fill a hole, which sees mask and masked picture in 5 more channels.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, section 4.5; the
pipeline is diffusers' own.
"""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionInpaintPipeline

from baselines.method import Method
from baselines.models import GUIDANCE, TARGET, Kit


class Inpainting(Method):
    title = "SDIP (inpainting)"
    source = "Rombach et al. 2022; diffusers"
    needs_training = True
    edits_part = True

    def __init__(self, kit: Kit) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionInpaintPipeline, kit.unet(in_channels=9))

    def make(self) -> Any:
        return self.pipe(
            TARGET,
            image=self.kit.image(),
            mask_image=self.kit.mask(),
            height=self.kit.size,
            width=self.kit.size,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=self.kit.generator(),
        ).images[0]
