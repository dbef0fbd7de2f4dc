"""What a method is asked for: one edit of one picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image


@dataclass(frozen=True)
class Task:
    """One edit.

    Attributes:
        prompt, words: what the picture shows, and what it is to show.
        picture: RGB. Methods that start from noise read its size alone.
        mask: of the picture's size, white where it is to change; None for methods that are given none.
        seed: of the noise that the model drew the picture from, on the CPU.
        guidance: the guidance scale.
    """

    prompt: str
    words: str
    picture: Image.Image
    mask: Image.Image | None
    seed: int
    guidance: float

    def drawn_from(self) -> torch.Generator:
        """The generator of the picture's own noise, for methods that draw it again."""
        return torch.Generator("cpu").manual_seed(self.seed)

    def other_noise(self) -> torch.Generator:
        """A generator for methods that are given the picture, and cannot know its noise."""
        return torch.Generator("cpu").manual_seed(self.seed + 1)
