"""InstructPix2Pix: a U-Net fine-tuned on instructions, guided by picture and text, so a batch of three.

Source: Brooks et al., "InstructPix2Pix: Learning to Follow Image Editing Instructions", CVPR 2023; the pipeline is
diffusers' own.
"""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionInstructPix2PixPipeline

from baselines.method import Method
from baselines.models import Kit
from baselines.task import Task
from baselines.trained import TrainedKit

#: The guidance scale towards the picture; diffusers' default.
IMAGE_GUIDANCE = 1.5


class InstructPix2Pix(Method):
    title = "InstructPix2Pix"
    source = "Brooks et al. 2023; diffusers"
    needs_training = True
    image_guidance: float = IMAGE_GUIDANCE

    def __init__(self, kit: Kit | TrainedKit) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionInstructPix2PixPipeline, kit.unet(in_channels=8))

    def edit(self, task: Task) -> Any:
        return self.pipe(
            task.words,
            image=task.picture,
            num_inference_steps=self.steps,
            guidance_scale=task.guidance,
            image_guidance_scale=self.image_guidance,
            generator=task.other_noise(),
        ).images[0]
