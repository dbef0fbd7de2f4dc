"""What an edit under a mask computes, by the plain pipeline: a second implementation, slow and without any graph.

While the pipeline draws the base's words, what each layer of the U-Net reads is noted. While it draws other words, each
layer at a resolution that is sparse reads that outside the mask and the cells around it. Group norms take the
statistics of the base; under a mask whose edit they follow, those of a map that is the base's but for the tiles that it
covers. Behind each step all that lies outside the mask is the base's.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from fisedit_compile.editing.running_edit import RIM
from fisedit_compile.editing.step_ends import end_steps
from fisedit_compile.ir.tile_grid import pixels_of_tiles
from fisedit_compile.masks.grown import grown
from fisedit_compile.planning.edit_plan import follows

_KINDS = (nn.Conv2d, nn.Linear, nn.GroupNorm)


class MaskedReference:
    """Draws with a pipeline as an edit without Prompt-to-Prompt control does.

    Args:
        pipe: the pipeline; it is left as it was.
        mask: bool ``[h, w]`` at latent resolution.
        dense_below: resolutions with a smaller side are computed whole.
    """

    def __init__(self, pipe: Any, mask: Tensor, dense_below: int) -> None:
        self._pipe, self._mask, self._dense_below = pipe, mask, dense_below
        self._region = grown(mask[None], RIM)[0]
        self._covered = _covered(self._region) if follows(self._region[None]) else torch.zeros_like(mask)
        # What makes a map larger reads all of the smaller one, which is whole.
        self._layers = {
            id(module)
            for name, module in pipe.unet.named_modules()
            if isinstance(module, _KINDS) and "upsamplers" not in name
        }
        self._noted: list[Any] = []
        self._steps: list[Tensor] = []

    def draw(self, prompt: str, new_prompt: str, arguments: Any) -> tuple[Tensor, Tensor]:
        """The final latents of both prompts, ``[n, c, h, w]``.

        Args:
            arguments: makes those of the pipeline's call, with a generator in its first state.
        """
        base = self._run(prompt, arguments(), self._note, self._note_step)
        self._place = 0
        return base, self._run(new_prompt, arguments(), self._mixed, self._mixed_step)

    def _run(self, prompt: str, arguments: Any, read: Any, step_end: Any) -> Tensor:
        own, self._pipe.scheduler = self._pipe.scheduler, copy.deepcopy(self._pipe.scheduler)
        end_steps(self._pipe.scheduler, lambda index, _, latents: step_end(index, latents))
        try:
            with self._layers_read(read):
                latents: Tensor = self._pipe(prompt, **arguments, output_type="latent").images
                return latents
        finally:
            self._pipe.scheduler = own

    @contextmanager
    def _layers_read(self, read: Any) -> Iterator[None]:
        """Within the context, ``read`` gives what a layer of the U-Net makes of its input."""

        def patched(kind: Any) -> Any:
            forward = kind.forward

            def call(module: Any, values: Tensor) -> Tensor:
                if id(module) not in self._layers or self._tokens(values) is None:
                    out: Tensor = forward(module, values)
                    return out
                return read(module, forward, values)  # type: ignore[no-any-return]

            return patch.object(kind, "forward", call)

        with patched(nn.Conv2d), patched(nn.Linear), patched(nn.GroupNorm):
            yield

    def _tokens(self, values: Tensor) -> Tensor | None:
        """What is computed in the form of a map or of tokens of a sparse resolution; None for anything else."""
        height, width = self._mask.shape
        if values.ndim == 4 and values.shape[2:] == (height, width) and min(height, width) >= self._dense_below:
            return self._region
        if values.ndim == 3 and values.shape[1] == height * width:
            return self._region.flatten()[:, None]
        return None

    def _note(self, module: Any, forward: Any, values: Tensor) -> Tensor:
        self._noted.append(values)
        out: Tensor = forward(module, values)
        return out

    def _mixed(self, module: Any, forward: Any, values: Tensor) -> Tensor:
        noted, self._place = self._noted[self._place], self._place + 1
        if isinstance(module, nn.GroupNorm):
            mean, deviation = _statistics(module, torch.where(self._covered, values, noted))
            grouped = values.unflatten(1, (module.num_groups, -1))
            normed = ((grouped - mean) / deviation).flatten(1, 2)
            return normed * module.weight[:, None, None] + module.bias[:, None, None]
        out: Tensor = forward(module, torch.where(self._tokens(values), values, noted))  # type: ignore[arg-type]
        return out

    def _note_step(self, index: int, latents: Tensor) -> Tensor:
        self._steps.append(latents)
        return latents

    def _mixed_step(self, index: int, latents: Tensor) -> Tensor:
        return torch.where(self._mask, latents, self._steps[index])


def _covered(region: Tensor) -> Tensor:
    """The cells of those tiles that lie in the region as a whole, bool ``[h, w]``."""
    covered, cells = torch.zeros_like(region).flatten(), region.flatten()
    for tile in pixels_of_tiles((region.shape[0], region.shape[1])):
        tile = tile[tile >= 0]
        covered[tile] = cells[tile].all()
    return covered.view_as(region)


def _statistics(norm: nn.GroupNorm, values: Tensor) -> tuple[Tensor, Tensor]:
    grouped = values.unflatten(1, (norm.num_groups, -1)).flatten(2)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0, keepdim=True)
    deviation = (variance + norm.eps).sqrt()
    return mean[..., None, None], deviation[..., None, None]
