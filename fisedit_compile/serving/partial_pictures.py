"""What is seen of a picture while it is drawn: the step, and now and then the picture itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fisedit_compile.serving.picture_files import as_png
from fisedit_compile.serving.requests import Progress


class StepWatch:
    """Tells a listener of the steps of a picture.

    Args:
        listener: called at the end of each step.
        pictures: how many of its calls bring the picture, decoded as it is at that step, noise and all.
    """

    def __init__(self, listener: Callable[[Progress], None], pictures: int) -> None:
        self._listener, self._pictures = listener, pictures

    def of(self, steps: int) -> Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]:
        """A ``callback_on_step_end`` that changes nothing, for a run of ``steps`` steps."""
        shown = {round((i + 1) * steps / (self._pictures + 1)) for i in range(self._pictures)} - {steps}

        def tell(pipe: Any, index: int, _: Any, values: dict[str, Any]) -> dict[str, Any]:
            step = index + 1
            self._listener(Progress(step, steps, _decoded(pipe, values["latents"]) if step in shown else None))
            return {}

        return tell


@torch.no_grad()
def _decoded(pipe: Any, latents: torch.Tensor) -> bytes | None:
    if pipe.vae.dtype == torch.float16 and getattr(pipe.vae.config, "force_upcast", False):
        return None  # it overflows, and casting it within the loop would be another model
    scaled = latents / pipe.vae.config.scaling_factor
    pixels = pipe.vae.decode(scaled.to(pipe.vae.dtype), return_dict=False)[0]
    return as_png(pipe.image_processor.postprocess(pixels.detach(), output_type="pil")[0])
