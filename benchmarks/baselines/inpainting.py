"""Inpainting (SDIP): a U-Net fine-tuned to fill a hole, which sees mask and masked picture in 5 more channels.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022, section 4.5; the
pipeline is diffusers' own. With a U-Net that was not trained for it, of 4 channels, the pipeline puts the picture's own
latents, under noise, back outside the mask after each step.
"""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionInpaintPipeline

from baselines.method import Method
from baselines.models import Kit
from baselines.task import Task
from baselines.trained import TrainedKit


class Inpainting(Method):
    title = "SDIP (inpainting)"
    source = "Rombach et al. 2022; diffusers"
    needs_training = True
    edits_part = True

    def __init__(self, kit: Kit | TrainedKit, in_channels: int = 9) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionInpaintPipeline, kit.unet(in_channels))

    def edit(self, task: Task) -> Any:
        return self.pipe(
            task.words,
            image=task.picture,
            mask_image=task.mask,
            height=task.picture.height,
            width=task.picture.width,
            num_inference_steps=self.steps,
            guidance_scale=task.guidance,
            generator=task.other_noise(),
        ).images[0]
