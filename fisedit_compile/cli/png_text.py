"""What a PNG says of its picture, in the form that A1111 writes and others read.

The text chunk ``parameters`` holds the prompt, ``Negative prompt:`` and one line of ``Key: value``. A1111's "PNG Info"
reads it, and so do galleries. ComfyUI keeps its own workflows in other chunks, which only it can write, but builds one
of this text where a PNG is dropped on it. Both can draw from the same words and settings. They do not draw the same
picture: their noise is another one, and an edit has a base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.PngImagePlugin import PngInfo

#: Names of A1111 for schedulers of diffusers; others go by their own name.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "KDPM2AncestralDiscreteScheduler": "DPM2 a",
    "KDPM2DiscreteScheduler": "DPM2",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "PNDMScheduler": "PLMS",
    "UniPCMultistepScheduler": "UniPC",
}

_SPACINGS = {
    "use_karras_sigmas": "Karras",
    "use_exponential_sigmas": "Exponential",
    "use_beta_sigmas": "Beta",
}


def parameters(prompt: str, negative: str | None, values: Mapping[str, Any]) -> str:
    """The text of the chunk.

    Args:
        prompt: of the picture.
        negative: its negative prompt, if it has one. There is a line for it in any case: ComfyUI looks for that.
        values: what the last line says, in this order; those that are None are left out.
    """
    said = ", ".join(f"{key}: {_quoted(value)}" for key, value in values.items() if value is not None)
    return "\n".join([prompt, f"Negative prompt: {negative or ''}", said])


def sampler(scheduler: str, options: Mapping[str, Any]) -> dict[str, str | None]:
    """The values ``Sampler`` and ``Schedule type`` of a scheduler of diffusers.

    Args:
        scheduler: the name of its class.
        options: its config.
    """
    spacing = next((name for option, name in _SPACINGS.items() if options.get(option)), None)
    return {"Sampler": _SAMPLERS.get(scheduler, scheduler.removesuffix("Scheduler")), "Schedule type": spacing}


def png_info(text: str) -> PngInfo:
    """The chunk, for ``Image.save(..., pnginfo=)``."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", text)
    return info


def _quoted(value: Any) -> str:
    """A value as A1111 writes it: JSON's quotes where it holds what separates values."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ',:\n"') else text
