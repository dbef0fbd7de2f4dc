"""This project as a method beside the others: edits of a base that exists already."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from baselines.fisedit import RoutedCalls
from baselines.method import Method
from baselines.task import Task
from PIL import Image

from fisedit_compile import Base, Editor
from fisedit_compile.errors import MaskError


class OwnEdits(Method):
    """An editor with its defaults. :meth:`draw` makes the base; no part of an edit, as it was there before.

    Args:
        pipe: the pipeline.
        steps, guidance: of bases and their edits.
    """

    title = "FISEdit"
    source: ClassVar[str] = "Yu et al. 2023; this project"
    edits_part = True

    def __init__(self, pipe: Any, steps: int, guidance: float) -> None:
        self.steps, self._guidance = steps, guidance
        self._editor, self._calls = Editor(pipe), RoutedCalls()
        self._base: Base | None = None

    @property
    def unet(self) -> torch.nn.Module:
        return self._calls

    def draw(self, prompt: str, seed: int) -> Image.Image:
        """Make the base that edits are of from now on; its picture."""
        self._base = None  # frees the last one's memory first
        self._base = self._editor.generate(
            prompt,
            num_inference_steps=self.steps,
            guidance_scale=self._guidance,
            generator=torch.Generator("cpu").manual_seed(seed),
        )
        picture: Image.Image = self._base.image
        return picture

    def edit(self, task: Task) -> Image.Image:
        """The base's edit under the task's mask, or under the one that is found; its picture where none is."""
        assert self._base is not None
        with self._calls.of_all_pipelines():
            try:
                picture: Image.Image = self._editor.edit(self._base, task.words, mask=task.mask).image
            except MaskError:
                picture = self._base.image
        return picture
