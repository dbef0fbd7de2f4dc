"""The end of each step of a pipeline whose call takes no ``callback_on_step_end``: what its scheduler returns.

Three pipelines of diffusers still have the callback of old, which is given the latents and returns nothing, and which
some steps of some schedulers leave out. Their loops are those of the others otherwise: a U-Net call, guidance, and the
scheduler's step, whose result the next step starts from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fisedit_compile.editing.stride import override_step

#: Pipelines without ``callback_on_step_end`` whose step ends with that of their scheduler.
WITHOUT_CALLBACK = (
    "StableDiffusionAdapterPipeline",
    "StableDiffusionXLAdapterPipeline",
    "StableDiffusionXLInstructPix2PixPipeline",
)


def end_steps(scheduler: Any, step_end: Callable[[int, Any, Tensor], Tensor]) -> None:
    """Let the latents that ``scheduler``, but none of its copies, returns go through ``step_end``.

    Args:
        scheduler: of one call of a pipeline; it is changed.
        step_end: is given how many steps ended before, the timestep, and the latents ``[n, c, h, w]``, and returns the
            latents that the next step starts from.
    """
    kind, ended = type(scheduler), 0

    def step(self: Any, model_output: Tensor, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal ended
        out = kind.step(self, model_output, timestep, *args, **kwargs)
        if self is not scheduler:
            return out
        latents = step_end(ended, timestep, out[0])
        ended += 1
        if isinstance(out, tuple):
            return (latents, *out[1:])
        out.prev_sample = latents
        return out

    override_step(scheduler, step)
