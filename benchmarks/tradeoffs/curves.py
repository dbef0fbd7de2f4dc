"""The methods, and the values of the parameter by which each trades the old picture for the new words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from baselines.diffedit import DiffEdit
from baselines.inpainting import Inpainting
from baselines.instruct_pix2pix import IMAGE_GUIDANCE, InstructPix2Pix
from baselines.method import Method
from baselines.pix2pix_zero import Pix2PixZero
from baselines.plug_and_play import PlugAndPlay
from baselines.prompt_to_prompt import CROSS_SHARE, PromptToPrompt
from baselines.sdedit import SDEdit
from baselines.text_to_image import TextToImage
from baselines.trained import TrainedKit

from fisedit_compile.editing.plain_pipeline import load_pipeline
from tradeoffs.own import OwnEdits


class Models:
    """What methods are made from.

    Args:
        pipe: the pipeline.
        own: this project's edits of it.
        instruct: folder of a pipeline that was trained for InstructPix2Pix, or None.
    """

    def __init__(self, pipe: Any, own: OwnEdits, instruct: Path | None) -> None:
        self.own, self._pipe, self._instruct = own, pipe, instruct

    def kit(self) -> TrainedKit:
        """The pipeline's models, with a U-Net to change."""
        return TrainedKit(self._pipe)

    @cached_property
    def instruct(self) -> TrainedKit:
        """Those of the pipeline that follows instructions."""
        assert self._instruct is not None
        device, dtype = self._pipe.unet.device, self._pipe.unet.dtype
        return TrainedKit(load_pipeline(self._instruct, torch.device(device), dtype))


@dataclass(frozen=True)
class Curve:
    """A method and its parameter.

    Attributes:
        title: the method's name.
        make: makes it.
        parameter: what people call the parameter; empty for a method without one.
        attribute: where the method keeps it; empty for an edited size, which is the mask's.
        values: of the parameter, as the paper has them.
        shown: the value in the grid of pictures.
    """

    title: str
    make: Callable[[Models], Method]
    parameter: str = ""
    attribute: str = ""
    values: Sequence[float] = ()
    shown: float | None = None


@dataclass(frozen=True)
class Setting:
    """A method with a value of its parameter; None for a method without one."""

    method: str
    value: float | None

    @property
    def name(self) -> str:
        """For keys and files."""
        return self.method if self.value is None else f"{self.method}-{self.value:g}"

    @property
    def title(self) -> str:
        """For people."""
        curve = CURVES[self.method]
        return curve.title if self.value is None else f"{curve.title}, {curve.parameter} {self.value:g}"


SIZES = (0.25, 0.5, 0.75)
INSTRUCT = "instruct-pix2pix"

#: By the names on the command line, in the order of the table.
CURVES: dict[str, Curve] = {
    "sdtp": Curve("SDTP (text to image)", lambda models: TextToImage(models.kit())),
    "sdip": Curve(
        "SDIP (inpainting, plain U-Net)",
        lambda models: Inpainting(models.kit(), in_channels=4),
        "edited size",
        values=SIZES,
        shown=SIZES[0],
    ),
    "prompt-to-prompt": Curve(
        "Prompt-to-Prompt",
        lambda models: PromptToPrompt(models.kit()),
        "cross_replace",
        "cross_share",
        (0.2, 0.4, 0.6, 0.8, 1.0),
        CROSS_SHARE,
    ),
    "pix2pix-zero": Curve("pix2pix-zero", lambda models: Pix2PixZero(models.kit())),
    "ppap": Curve("PPAP (Plug-and-Play)", lambda models: PlugAndPlay(models.kit())),
    INSTRUCT: Curve(
        "InstructPix2Pix",
        lambda models: InstructPix2Pix(models.instruct),
        "image guidance",
        "image_guidance",
        (1.0, 1.5, 2.0, 2.5),
        IMAGE_GUIDANCE,
    ),
    "sdedit": Curve(
        "SDEdit", lambda models: SDEdit(models.kit()), "strength", "strength", (0.5, 0.55, 0.6, 0.65, 0.7, 0.75), 0.65
    ),
    "diffedit": Curve(
        "DIFFEdit", lambda models: DiffEdit(models.kit()), "strength", "strength", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0), 0.8
    ),
    "fisedit": Curve("FISEdit, mask found", lambda models: models.own),
    "fisedit-size": Curve(
        "FISEdit, mask given", lambda models: models.own, "edited size", values=SIZES, shown=SIZES[0]
    ),
}


def settings_of(methods: Sequence[str]) -> list[Setting]:
    """All settings of some methods, in the order of the table."""
    return [
        Setting(name, value) for name, curve in CURVES.items() if name in methods for value in curve.values or (None,)
    ]
