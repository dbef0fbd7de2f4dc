"""SDEdit: noise is added to the picture, and the new words guide it back.

Source: Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations", ICLR 2022;
the pipeline is diffusers' own.
"""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionImg2ImgPipeline

from baselines.method import Method
from baselines.models import Kit
from baselines.task import Task
from baselines.trained import TrainedKit

#: The share of the steps that run; diffusers' default.
STRENGTH = 0.8


class SDEdit(Method):
    title = "SDEdit"
    source = "Meng et al. 2022; diffusers"
    strength: float = STRENGTH

    def __init__(self, kit: Kit | TrainedKit) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionImg2ImgPipeline, kit.unet())

    def edit(self, task: Task) -> Any:
        return self.pipe(
            task.words,
            image=task.picture,
            strength=self.strength,
            num_inference_steps=self.steps,
            guidance_scale=task.guidance,
            generator=task.other_noise(),
        ).images[0]
