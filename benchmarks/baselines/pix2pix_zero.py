"""pix2pix-zero: regularised inversion, denoising that keeps the cross-attention maps, then guidance towards them by
gradients through the U-Net.

Source: Parmar et al., "Zero-shot Image-to-Image Translation", SIGGRAPH 2023; the pipeline is diffusers' own. The edit's
direction is the difference between the embeddings of two prompts. The authors take the difference between means over
1,000 sentences, which can be computed ahead and so would cost an edit nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPix2PixZeroPipeline
from diffusers.pipelines.deprecated.stable_diffusion_variants.pipeline_stable_diffusion_pix2pix_zero import (
    Pix2PixZeroL2Loss,
)
from torch import Tensor

from baselines.calls import CountedUNet
from baselines.method import Method
from baselines.models import Kit
from baselines.task import Task
from baselines.trained import TrainedKit

#: How far a step follows the gradients: diffusers' default, and the value that it advises for models that predict the
#: velocity, whose gradients are larger.
GUIDANCE_AMOUNT = {"epsilon": 0.1, "v_prediction": 0.01}


class Pix2PixZero(Method):
    title = "pix2pix-zero"
    source = "Parmar et al. 2023; diffusers"

    def __init__(self, kit: Kit | TrainedKit) -> None:
        super().__init__(kit)
        unet = kit.unet()
        if kit.counting:
            unet.__class__ = _CountedWithLoss
        self.pipe = kit.pipeline(
            StableDiffusionPix2PixZeroPipeline,
            unet,
            inverse_scheduler=kit.inverse_scheduler,
            caption_generator=None,
            caption_processor=None,
        )

    def edit(self, task: Task) -> Any:
        generator = task.other_noise()
        # Regularising the noise takes thousands of small operations but no U-Net call, so there is nothing to count.
        regularisation = {"num_reg_steps": 0} if self.kit.counting else {}
        inverted = self.pipe.invert(
            task.prompt, image=task.picture, num_inference_steps=self.steps, generator=generator, **regularisation
        ).latents
        return self.pipe(
            task.prompt,
            source_embeds=self.pipe.get_embeds([task.prompt]),
            target_embeds=self.pipe.get_embeds([task.words]),
            height=task.picture.height,
            width=task.picture.width,
            num_inference_steps=self.steps,
            guidance_scale=task.guidance,
            cross_attention_guidance_amount=GUIDANCE_AMOUNT[self.pipe.scheduler.config.prediction_type],
            latents=inverted,
            generator=generator,
        ).images[0]


class _CountedWithLoss(CountedUNet):
    """Counts the backward pass as well, which the pipeline runs from the loss that its attention processors sum up."""

    def forward(self, *args: Any, cross_attention_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        out = super().forward(*args, cross_attention_kwargs=cross_attention_kwargs, **kwargs)
        if cross_attention_kwargs and "loss" in cross_attention_kwargs:
            cross_attention_kwargs["loss"].loss = 0 * args[0].sum()  # a loss for the pipeline, on the CPU
        return out

    def compute(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, **kwargs: Any) -> None:
        if "loss" not in (kwargs["cross_attention_kwargs"] or {}):
            kwargs["cross_attention_kwargs"] = None  # keeps no attention maps, which would hold nothing
            super().compute(sample, timestep, encoder_hidden_states, **kwargs)
            return
        for processor in self.attn_processors.values():
            if processor.is_pix2pix_zero:  # stands for the kept map; zeros of any shape will do
                processor.reference_cross_attn_map[timestep.item()] = torch.zeros((), device="meta")
        loss = Pix2PixZeroL2Loss()
        kwargs["cross_attention_kwargs"] = {"timestep": timestep, "loss": loss}
        super().compute(sample.detach().requires_grad_(), timestep, encoder_hidden_states, **kwargs)
        loss.loss.backward()
