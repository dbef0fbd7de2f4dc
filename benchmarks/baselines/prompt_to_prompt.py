"""Prompt-to-Prompt: the picture is made again beside its edit, which takes over its attention maps.

Source: Hertz et al., "Prompt-to-Prompt Image Editing with Cross Attention Control", ICLR 2023, section 3.2 (word swap).
Both pictures are in one batch, which under guidance has four samples. The shares of the steps and the largest
self-attention are those of the authors' examples. Attention maps are computed explicitly only where they are exchanged,
in the method's favour.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from baselines.attention import attend
from baselines.method import Method
from baselines.models import Kit
from baselines.task import Task
from baselines.trained import TrainedKit
from fisedit_compile.editing.prompt_alignment import align_batch
from fisedit_compile.kernels.attention.controlled_attention import attention_probabilities, controlled_attention

#: Shares of the steps in which cross- and self-attention are taken over.
CROSS_SHARE, SELF_SHARE = 0.8, 0.4

#: Self-attention is taken over up to this many tokens.
MOST_TOKENS = 32**2

# The batch has both pictures without words and then both with their words; these are the positions of the latter.
_SOURCE_AT, _TARGET_AT = 2, 3


class PromptToPrompt(Method):
    title = "Prompt-to-Prompt"
    source = "Hertz et al. 2023; ours"
    cross_share: float = CROSS_SHARE

    def __init__(self, kit: Kit | TrainedKit) -> None:
        super().__init__(kit)
        self.pipe = kit.pipeline(StableDiffusionPipeline, kit.unet())
        self.done = 0  # the number of denoising steps done
        self.pipe.unet.set_attn_processor(
            {name: Processor(self, cross="attn2" in name) for name in self.pipe.unet.attn_processors}
        )

    def takes_over(self, cross: bool, done: int) -> bool:
        return done < (self.cross_share if cross else SELF_SHARE) * self.steps

    def kind(self, index: int) -> str:
        names = [name for name, cross in (("cross", True), ("self", False)) if self.takes_over(cross, index)]
        return f"{' and '.join(names)}-attention taken over" if names else ""

    def edit(self, task: Task) -> Any:
        latents = self.noise(task).repeat(2, 1, 1, 1)
        tokenizer, device = self.pipe.tokenizer, self.kit.unet_device
        self.mapper, self.keep = align_batch(tokenizer, [task.prompt], [task.words], device=device)
        self.done = 0
        return self.pipe(
            [task.prompt, task.words],
            num_inference_steps=self.steps,
            guidance_scale=task.guidance,
            latents=latents,
            callback_on_step_end=self._step_end,
        ).images[1]

    def noise(self, task: Task) -> Tensor:
        """The noise that the picture was drawn from, ``[1, channels, h, w]``."""
        scale, kit = self.pipe.vae_scale_factor, self.kit
        shape = (1, self.pipe.unet.config.in_channels, task.picture.height // scale, task.picture.width // scale)
        return randn_tensor(shape, generator=task.drawn_from(), device=kit.device, dtype=kit.dtype)

    def _step_end(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        self.done = index + 1
        return {}


class Processor:
    """Attention in which the edit takes over the source's maps for as long as the method says."""

    def __init__(self, method: PromptToPrompt, *, cross: bool) -> None:
        self._method, self._cross = method, cross

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None
    ) -> Tensor:
        core: Any = F.scaled_dot_product_attention
        if self._method.takes_over(self._cross, self._method.done):
            if self._cross:
                core = partial(_cross, mapper=self._method.mapper, keep=self._method.keep)
            elif hidden_states.shape[1] <= MOST_TOKENS:
                core = _self
        return attend(attn, hidden_states, encoder_hidden_states, core)


def _cross(q: Tensor, k: Tensor, v: Tensor, *, mapper: Tensor, keep: Tensor) -> Tensor:
    """Attention in which unchanged words keep the source's maps: q ``[4, heads, N, d]``, k, v ``[4, heads, T, d]``."""
    kept = attention_probabilities(q[_SOURCE_AT:_TARGET_AT], k[_SOURCE_AT:_TARGET_AT], samples=1)
    plain = F.scaled_dot_product_attention(q[:_TARGET_AT], k[:_TARGET_AT], v[:_TARGET_AT])
    return torch.cat([plain, controlled_attention(q[_TARGET_AT:], k[_TARGET_AT:], v[_TARGET_AT:], kept, mapper, keep)])


def _self(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in which the edit has the source's maps, from the source's queries and keys, over its own values."""
    q, k = (torch.cat([x[:_TARGET_AT], x[_SOURCE_AT:_TARGET_AT]]) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v)
