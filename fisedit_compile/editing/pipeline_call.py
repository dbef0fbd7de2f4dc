"""One call of a diffusers pipeline whose U-Net's and decoder's calls go elsewhere; it is not changed itself.

A pipeline keeps the state of its loop on itself (guidance scale, interruption) and in its scheduler, so two calls of
one pipeline at a time would mix. Here each call has a copy: the same modules, but a scheduler of its own and stand-ins
for U-Net and VAE. Calls in other threads, of the pipeline itself or of other editors, see nothing of it.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable, Iterator
from functools import cached_property, lru_cache
from typing import Any
from weakref import WeakKeyDictionary

import torch

from fisedit_compile.editing.host_timesteps import keep_on_host
from fisedit_compile.editing.own_tokenizers import OwnTokenizers
from fisedit_compile.editing.quick_pictures import quick
from fisedit_compile.errors import FiseditError, PipelineInterruptedError
from fisedit_compile.vae.decoder import can_be_sparse

_turns: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()
_turns_lock = threading.Lock()


@contextlib.contextmanager
def in_turn(pipe: Any) -> Iterator[None]:
    """Within the context, no other thread is within it with a pipeline that shares a model with this one.

    Pipelines write to their models while they run: they scale a text encoder's LoRA, and cast the VAE of SDXL.
    """
    models = sorted({part for part in pipe.components.values() if isinstance(part, torch.nn.Module)}, key=id)
    with _turns_lock:
        turns = [_turns.setdefault(model, threading.RLock()) for model in models]
    with contextlib.ExitStack() as stack:
        for turn in turns:  # in one order for all, so that no two threads wait for each other
            stack.enter_context(turn)
        yield


@lru_cache(maxsize=32)
def _with_one_device(kind: type) -> type:
    """The same class of pipelines, which searches once where it runs.

    A pipeline asks several times a call, and goes through all modules of all its parts for it, which takes 3 ms.
    """
    searched = cached_property(kind._execution_device.fget)  # type: ignore[attr-defined]
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), {**names, "_execution_device": searched})


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


class VaeRoute(torch.nn.Module):
    """Stands for the VAE in one call of a pipeline: has its attributes, and offers what it is to decode to ``handler``.

    Args:
        vae: the VAE.
        handler: returns the pictures of latents, or None for the VAE to decode them.

    Attributes:
        vae: the VAE itself.
    """

    def __init__(self, vae: torch.nn.Module, handler: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
        super().__init__()
        self.vae = vae
        self.training = vae.training
        self._handler = handler

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("vae"), name)

    def decode(self, z: torch.Tensor, return_dict: bool = True, **options: Any) -> Any:
        """As the VAE's; ``options`` are the generator, which the decoders that can be routed do not read."""
        picture = self._handler(z)
        if picture is None:
            return self.vae.decode(z, return_dict=return_dict, **options)  # type: ignore[operator]
        if not return_dict:
            return (picture,)
        from diffusers.models.autoencoders.vae import DecoderOutput

        return DecoderOutput(sample=picture)


class PipelineCall:
    """A call of ``pipe`` that is to be made once, :func:`in_turn`.

    Args:
        pipe: the pipeline.
        unet_handler: what the calls of its U-Net go to.
        decode_handler: what latents that its VAE is to decode are offered to, see :class:`VaeRoute`. A VAE that can
            only be dense is left alone.
        tokenizers: of the editor.

    Attributes:
        pipe: the copy that runs; what callbacks are given as their pipeline.
    """

    def __init__(
        self,
        pipe: Any,
        unet_handler: Callable[..., Any],
        decode_handler: Callable[[torch.Tensor], torch.Tensor | None],
        tokenizers: OwnTokenizers,
    ) -> None:
        self._original = pipe
        if getattr(pipe, "_interrupt", False):
            pipe._interrupt = False  # as every call of a pipeline begins: it was meant for the one before
        self.pipe = tokenizers.within(pipe)
        # Not by setattr, which would write the modules' new classes into the pipeline's config.
        state = vars(self.pipe)
        state["unet"] = UNetRoute(pipe.unet, unet_handler)
        if can_be_sparse(getattr(pipe, "vae", None)):
            state["vae"] = VaeRoute(pipe.vae, decode_handler)
        if (processor := state.get("image_processor")) is not None:
            state["image_processor"] = quick(processor)
        kind: Any = type(pipe)
        if isinstance(kind._execution_device, property):
            self.pipe.__class__ = _with_one_device(kind)
        state["scheduler"] = copy.deepcopy(pipe.scheduler)
        keep_on_host(self.pipe.scheduler)
        # Offloading hooks belong to the pipeline itself, which sets them up anew at the end of each call.
        state["maybe_free_model_hooks"] = pipe.maybe_free_model_hooks

    def __call__(self, **arguments: Any) -> Any:
        """What the pipeline returns.

        Raises:
            PipelineInterruptedError: see :meth:`raise_if_interrupted`, which the handlers of the call have to ask.
            FiseditError: what the handlers raise.
        """
        try:
            return self.pipe(**arguments)
        except FiseditError:
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
        """What the pipeline itself holds of its own loop, without the interruption: to see whether it is written to."""
        state = vars(self._original)
        return {name: state[name] for name in state if name.startswith("_") and name != "_interrupt"}
