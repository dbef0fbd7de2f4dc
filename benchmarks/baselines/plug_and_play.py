"""Plug-and-Play (PPAP): the picture is inverted, and its features and self-attention are put into the edit.

Source: Tumanyan et al., "Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation", CVPR 2023,
section 4. In the first 80 % of the steps the features of the decoder's layer 4 come from the denoising of the picture
itself, and in the first 50 % so do the queries and keys of self-attention in layers 4 to 11. That denoising runs in one
batch with the edit, with three samples under guidance. The authors invert in 1,000 steps; here inversion takes as many
steps as denoising, in the method's favour.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from torch import Tensor

from baselines.attention import attend
from baselines.method import Method
from baselines.models import Kit
from baselines.task import Task
from baselines.trained import TrainedKit

#: Shares of the steps in which features and self-attention are injected.
FEATURE_SHARE, ATTENTION_SHARE = 0.8, 0.5

#: The first layer of the decoder that takes over, counted from the innermost; each block has three layers.
FIRST_LAYER = 4


class PlugAndPlay(Method):
    title = "PPAP (Plug-and-Play)"
    source = "Tumanyan et al. 2023; ours"

    def __init__(self, kit: Kit | TrainedKit) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionPipeline, kit.unet())
        self.done = -1  # the number of denoising steps done; negative during inversion
        layers = list(_decoder_layers(self.pipe.unet))
        layers[FIRST_LAYER][0].conv2.register_forward_hook(self._inject_features)
        for _, transformer in layers[FIRST_LAYER:]:
            for block in transformer.transformer_blocks if transformer else ():
                block.attn1.set_processor(_Processor(self))

    def injects(self, share: float, done: int) -> bool:
        return 0 <= done < share * self.steps

    def kind(self, index: int) -> str:
        done = index - self.steps
        if done < 0:
            return "inversion"
        names = {"features": FEATURE_SHARE, "self-attention": ATTENTION_SHARE}
        injected = [name for name, share in names.items() if self.injects(share, done)]
        return f"{' and '.join(injected)} injected" if injected else ""

    @torch.no_grad()
    def edit(self, task: Task) -> Any:
        self.done = -1
        inverted = self._invert(task)
        nothing, words = self._embed(""), self._embed(task.words)
        text = torch.cat([self._embed(task.prompt), nothing, words])
        scheduler, latents = self.pipe.scheduler, inverted[-1]
        scheduler.set_timesteps(self.steps, device=self.kit.device)
        for self.done, timestep in enumerate(scheduler.timesteps):
            batch = torch.cat([inverted[-1 - self.done], latents, latents])
            out = self.pipe.unet(batch, timestep, encoder_hidden_states=text).sample
            _, plain, guided = out.chunk(3)
            latents = scheduler.step(plain + task.guidance * (guided - plain), timestep, latents).prev_sample
        picture = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample
        return self.pipe.image_processor.postprocess(picture)[0]

    def _invert(self, task: Task) -> list[Tensor]:
        """Latents of the picture, one for each noise level, the least noisy first."""
        pixels = self.pipe.image_processor.preprocess(task.picture).to(self.kit.device, self.kit.dtype)
        latents = self.pipe.vae.encode(pixels).latent_dist.mode() * self.pipe.vae.config.scaling_factor
        scheduler, text, inverted = self.kit.inverse_scheduler, self._embed(task.prompt), []
        scheduler.set_timesteps(self.steps, device=self.kit.device)
        for timestep in scheduler.timesteps:
            out = self.pipe.unet(latents, timestep, encoder_hidden_states=text).sample
            latents = scheduler.step(out, timestep, latents).prev_sample
            inverted.append(latents)
        return inverted

    def _embed(self, prompt: str) -> Tensor:
        embedded: Tensor = self.pipe.encode_prompt(prompt, self.kit.device, 1, False)[0]
        return embedded

    def _inject_features(self, module: Any, args: Any, out: Tensor) -> Tensor | None:
        if not self.injects(FEATURE_SHARE, self.done):
            return None
        return out[:1].expand_as(out)


def _decoder_layers(unet: Any) -> Iterator[tuple[Any, Any]]:
    """The ResNet block and the transformer, or None without one, of each layer of the decoder."""
    for block in unet.up_blocks:
        transformers = getattr(block, "attentions", [None] * len(block.resnets))
        yield from zip(block.resnets, transformers, strict=True)


class _Processor:
    """Self-attention whose queries and keys are those of the first sample, the picture's own."""

    def __init__(self, method: PlugAndPlay) -> None:
        self._method = method

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None
    ) -> Tensor:
        injects = self._method.injects(ATTENTION_SHARE, self._method.done)
        return attend(attn, hidden_states, None, _inject if injects else F.scaled_dot_product_attention)


def _inject(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q[:1].expand_as(q), k[:1].expand_as(k), v)
