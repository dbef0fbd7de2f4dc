"""Methods that edit a photo by words, each with the models of one pipeline.

Sources: DDIM inversion (Song, Meng and Ermon 2020) with Prompt-to-Prompt (Hertz et al. 2023), SDEdit (Meng et al. 2022)
and DIFFEdit (Couairon et al. 2023), all as in ``benchmarks/baselines``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from baselines.diffedit import STRENGTH as DIFFEDIT_STRENGTH
from baselines.diffedit import DiffEdit
from baselines.method import Method
from baselines.prompt_to_prompt import PromptToPrompt
from baselines.sdedit import STRENGTH as SDEDIT_STRENGTH
from baselines.sdedit import SDEdit
from baselines.task import Task
from baselines.trained import TrainedKit
from PIL import Image
from torch import Tensor

from fisedit_compile import Editor
from fisedit_compile.editing.photo import encode
from fisedit_compile.errors import MaskError


@dataclass(frozen=True)
class Settings:
    """Of all methods: denoising steps and guidance scale."""

    steps: int
    guidance: float


class FisEdit:
    """This project: inversion, a mask from the words, sparse steps.

    ``base_seconds`` is what the last base took, from words or a photo to one that can be edited.
    """

    name, title = "FisEdit", "FISEdit"

    def __init__(self, pipe: Any, settings: Settings) -> None:
        self._editor = Editor(pipe)
        self._arguments = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance}
        self.base_seconds = 0.0

    def edit(self, photo: Image.Image, prompt: str, words: str) -> Image.Image:
        """The photo, changed by the words; the photo itself where no mask can be found."""
        return self._edited(self._timed(self._editor.invert, photo, prompt), words)

    def edit_generated(self, prompt: str, words: str, seed: int) -> tuple[Image.Image, Image.Image]:
        """The same of a picture that the model draws: before and after."""
        generator = torch.Generator("cpu").manual_seed(seed)
        base = self._timed(partial(self._editor.generate, generator=generator), prompt)
        return base.image, self._edited(base, words)

    def _timed(self, make: Callable[..., Any], *what: Any) -> Any:
        start = time.perf_counter()
        base = make(*what, **self._arguments)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.base_seconds = time.perf_counter() - start
        return base

    def _edited(self, base: Any, words: str) -> Image.Image:
        try:
            picture: Image.Image = self._editor.edit(base, words).image
        except MaskError:
            picture = base.image
        return picture


class InvertedPromptToPrompt(PromptToPrompt):
    """DDIM inversion without guidance, then Prompt-to-Prompt from the noise that it found."""

    def __init__(self, kit: TrainedKit) -> None:
        super().__init__(kit)
        self._backwards = kit.pipeline(
            diffusers.StableDiffusionPipeline, self.pipe.unet, scheduler=kit.inverse_scheduler
        )

    def noise(self, task: Task) -> Tensor:
        """The noise that the picture is found to come from."""
        self.done = self.steps  # nothing is taken over
        noise: Tensor = self._backwards(
            task.prompt,
            latents=encode(self._backwards, [task.picture], self.pipe.unet.dtype),
            num_inference_steps=self.steps,
            guidance_scale=1.0,
            output_type="latent",
        ).images
        return noise


class Baseline:
    """A method of ``benchmarks/baselines``, given a photo.

    Args:
        kind: the method.
        title: with what its parameters are.
        pipe, settings: the pipeline, which stays as it is, and what is equal for all.
    """

    def __init__(self, kind: Callable[[Any], Method], title: str, pipe: Any, settings: Settings) -> None:
        self._method, self._guidance, self.title = kind(TrainedKit(pipe)), settings.guidance, title
        self._method.steps, self.name = settings.steps, type(self._method).__name__

    def edit(self, photo: Image.Image, prompt: str, words: str) -> Image.Image:
        """The photo, changed by the words."""
        picture: Image.Image = self._method.edit(Task(prompt, words, photo, None, 0, self._guidance))
        return picture


#: Name on the command line -> method.
METHODS: dict[str, Callable[[Any, Settings], Any]] = {
    "fisedit": FisEdit,
    "p2p": partial(Baseline, InvertedPromptToPrompt, "DDIM inversion + Prompt-to-Prompt"),
    "sdedit": partial(Baseline, SDEdit, f"SDEdit, strength {SDEDIT_STRENGTH}"),
    "diffedit": partial(Baseline, DiffEdit, f"DIFFEdit, strength {DIFFEDIT_STRENGTH}"),
}
