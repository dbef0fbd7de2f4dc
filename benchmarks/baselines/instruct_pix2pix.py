"""InstructPix2Pix: a U-Net fine-tuned on instructions, guided by picture and text, so a batch of three.

Source: Brooks et al., "InstructPix2Pix: Learning to Follow Image Editing Instructions", CVPR 2023; the pipeline is
diffusers' own.
"""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionInstructPix2PixPipeline

from baselines.method import Method
from baselines.models import GUIDANCE, TARGET, Kit


class InstructPix2Pix(Method):
    title = "InstructPix2Pix"
    source = "Brooks et al. 2023; diffusers"
    needs_training = True

    def __init__(self, kit: Kit) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionInstructPix2PixPipeline, kit.unet(in_channels=8))

    def make(self) -> Any:
        return self.pipe(
            TARGET,
            image=self.kit.image(),
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            image_guidance_scale=1.5,
            generator=self.kit.generator(),
        ).images[0]
