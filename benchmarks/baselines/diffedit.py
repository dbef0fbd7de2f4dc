"""DiffEdit: a mask from where the predictions for both prompts differ, inversion of the picture, then masked denoising.

Source: Couairon et al., "DiffEdit: Diffusion-based Semantic Image Editing with Mask Guidance", ICLR 2023; the pipeline
is diffusers' own. The mask is the mean over 10 noises, so its one call has a batch of 40: two prompts, with guidance.
"""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionDiffEditPipeline

from baselines.method import Method
from baselines.models import Kit
from baselines.task import Task
from baselines.trained import TrainedKit

#: The share of the steps that are inverted and denoised again, and the number of noises; both are diffusers' defaults.
STRENGTH, NOISES = 0.8, 10


class DiffEdit(Method):
    title = "DIFFEdit"
    source = "Couairon et al. 2023; diffusers"
    edits_part = True
    strength: float = STRENGTH

    def __init__(self, kit: Kit | TrainedKit) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionDiffEditPipeline, kit.unet(), inverse_scheduler=kit.inverse_scheduler)

    def edit(self, task: Task) -> Any:
        common = {
            "num_inference_steps": self.steps,
            "guidance_scale": task.guidance,
            "generator": task.other_noise(),
        }
        image, strength = task.picture, {"inpaint_strength": self.strength}
        mask = self.pipe.generate_mask(
            image, source_prompt=task.prompt, target_prompt=task.words, num_maps_per_mask=NOISES, **common
        )
        inverted = self.pipe.invert(task.prompt, image=image, **strength, **common).latents
        return self.pipe(task.words, mask_image=mask, image_latents=inverted, **strength, **common).images[0]
