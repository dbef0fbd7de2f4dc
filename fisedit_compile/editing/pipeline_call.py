"""One call of a diffusers pipeline whose U-Net's calls go elsewhere; the pipeline itself is not changed.

A pipeline keeps the state of its loop on itself (guidance scale, interruption) and in its scheduler, so two calls of one
object at a time mix. Here each call has a copy of its own: with the same modules, another scheduler, and a stand-in for
the U-Net. Calls in other threads, of the pipeline itself or of other editors, see nothing of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from fisedit_compile.errors import PipelineInterruptedError


class UNetRoute(torch.nn.Module):
    """Stands for the U-Net in one call of a pipeline: has its attributes, and sends calls to ``handler``."""

    def __init__(self, unet: torch.nn.Module, handler: Callable[..., Any]) -> None:
        super().__init__()
        self.unet = unet
        self.training = unet.training
        self._handler = handler

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the handler returns; hooks of the U-Net are the handler's matter."""
        return self._handler(*args, **kwargs)


class PipelineCall:
    """A call of ``pipe`` that is to be made once.

    Attributes:
        pipe: the copy that runs; what callbacks are given as their pipeline.
    """

    def __init__(self, pipe: Any, unet_handler: Callable[..., Any]) -> None:
        self._original = pipe
        if getattr(pipe, "_interrupt", False):
            pipe._interrupt = False  # as every call of a pipeline begins: it was meant for the one before
        self.pipe = copy.copy(pipe)
        # Not by setattr, which would write the modules' new classes into the pipeline's config.
        state = vars(self.pipe)
        state["unet"] = UNetRoute(pipe.unet, unet_handler)
        state["scheduler"] = copy.deepcopy(pipe.scheduler)
        # Offloading hooks belong to the pipeline itself, which sets them up anew at the end of each call.
        state["maybe_free_model_hooks"] = pipe.maybe_free_model_hooks

    def __call__(self, **arguments: Any) -> Any:
        """What the pipeline returns.

        Raises:
            PipelineInterruptedError: see :meth:`raise_if_interrupted`, which the handlers of the call have to ask.
        """
        try:
            return self.pipe(**arguments)
        except PipelineInterruptedError:
            self._original.maybe_free_model_hooks()  # the pipeline's loop was left before it could
            raise

    def raise_if_interrupted(self) -> None:
        """Leave the loop if ``_interrupt`` was set, on the copy by a callback or on the pipeline by anyone.

        Raises:
            PipelineInterruptedError: it was.
        """
        if getattr(self.pipe, "_interrupt", False) or getattr(self._original, "_interrupt", False):
            raise PipelineInterruptedError(
                "stopped by pipe._interrupt: nothing was kept of this call, and it can be made again"
            )

    def original_state(self) -> dict[str, Any]:
        """What the pipeline itself holds of its own loop, but for the interruption; to see whether it was written to."""
        state = vars(self._original)
        return {name: state[name] for name in state if name.startswith("_") and name != "_interrupt"}
