"""Text to image (SDTP): the picture is made again from the new words.

Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", CVPR 2022; the pipeline is
diffusers' own.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from baselines.method import Method
from baselines.models import Kit
from baselines.task import Task
from baselines.trained import TrainedKit


class TextToImage(Method):
    title = "SDTP (text to image)"
    source = "Rombach et al. 2022; diffusers"

    def __init__(self, kit: Kit | TrainedKit) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionPipeline, kit.unet())

    def edit(self, task: Task) -> Any:
        return self.pipe(
            task.words,
            height=task.picture.height,
            width=task.picture.width,
            num_inference_steps=self.steps,
            guidance_scale=task.guidance,
            generator=task.drawn_from(),
        ).images[0]


class CompiledTextToImage(TextToImage):
    """Text to image under ``torch.compile``, on CUDA with CUDA graphs: speed-ups should be measured against this."""

    title = "SDTP, torch.compile"
    source = "Rombach et al. 2022; diffusers and torch.compile"

    def __init__(self, kit: Kit) -> None:
        super().__init__(kit)
        if not kit.counting:
            # CUDA graphs, because FISEdit has them, too.
            mode = "reduce-overhead" if kit.device.type == "cuda" else "default"
            self.pipe.unet = torch.compile(self.pipe.unet, mode=mode)

    def prepare(self, steps: int) -> None:
        if not self.kit.counting:
            self.run(2)  # compiles; on CUDA the warm-up that follows captures the graphs

    def close(self) -> None:
        torch.compiler.reset()  # frees the code of this U-Net, and with it its memory
