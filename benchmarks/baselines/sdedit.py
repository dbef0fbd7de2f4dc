"""SDEdit: noise is added to the picture, and the new words guide it back.

Source: Meng et al., "SDEdit: Guided Image Synthesis and Editing with Stochastic Differential Equations", ICLR 2022;
the pipeline is diffusers' own.
"""

from __future__ import annotations

from typing import Any

from diffusers import StableDiffusionImg2ImgPipeline

from baselines.method import Method
from baselines.models import GUIDANCE, TARGET, Kit

#: The share of the steps that run; diffusers' default.
STRENGTH = 0.8


class SDEdit(Method):
    title = "SDEdit"
    source = "Meng et al. 2022; diffusers"

    def __init__(self, kit: Kit) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionImg2ImgPipeline, kit.unet())

    def make(self) -> Any:
        return self.pipe(
            TARGET,
            image=self.kit.image(),
            strength=STRENGTH,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=self.kit.generator(),
        ).images[0]
