"""``sparsify(unet)``: a drop-in for a diffusers U-Net that can also record a call and recompute a region of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.step_cache import Recorded, StepCache
from fisedit_compile.compiler.lowered import lower
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import BaseMismatchError, CaptureError
from fisedit_compile.ir.call import Call, Signature, bind
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.runtime.program import Program


def sparsify(unet: torch.nn.Module, config: SparsityConfig | dict[str, Any] | None = None) -> SparseUNet:
    """Make a diffusers U-Net mask-aware.

    Args:
        unet: a ``UNet2DConditionModel``, or the result of ``torch.compile`` on one. It is not changed.
        config: a :class:`SparsityConfig`, a dict of its fields, or None for the defaults.

    Returns:
        A module that behaves as ``unet`` and has :meth:`SparseUNet.record`, :meth:`SparseUNet.plan` and
        :meth:`SparseUNet.step`. Graphs are captured on first use, once for each signature of inputs.

    Raises:
        CaptureError: not a U-Net of this kind.
        ValueError: an unknown config field or value.
    """
    return SparseUNet(unet, SparsityConfig.of(config))


class SparseUNet(torch.nn.Module):
    """See :func:`sparsify`. Calling it runs the dense U-Net, exactly, unless a handler is set.

    Attributes of the wrapped U-Net (``config``, ``dtype``, ``device``, ...) are its own.
    """

    def __init__(self, unet: torch.nn.Module, config: SparsityConfig) -> None:
        super().__init__()
        original = getattr(unet, "_orig_mod", unet)
        if isinstance(original, SparseUNet):
            raise CaptureError("the U-Net is sparse already: pass the original, or use it as it is")
        from diffusers import (
            UNet2DConditionModel,  # imported here: it takes a second, `import fisedit_compile` must not
        )

        if not isinstance(original, UNet2DConditionModel):
            raise CaptureError(
                f"sparsify takes a diffusers UNet2DConditionModel, not a {type(original).__name__}: pass pipe.unet"
            )
        self.unet = unet
        self.sparsity = config
        self._original = (original,)  # in a tuple: not a second submodule
        self._programs: dict[Signature, Program] = {}
        self._weights = _parameter_ids(original)
        self._handler: Callable[..., Any] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense U-Net, or the handler set by :meth:`handled_by`."""
        return (self._handler or self.unet)(*args, **kwargs)

    @contextmanager
    def handled_by(self, handler: Callable[..., Any]) -> Iterator[SparseUNet]:
        """Within the context, calls go to ``handler``: so a pipeline that calls its U-Net records or edits."""
        if self._handler is not None:
            raise RuntimeError("this U-Net is recording or editing already: finish that first")
        self._handler = handler
        try:
            yield self
        finally:
            self._handler = None

    def call(self, *args: Any, **kwargs: Any) -> Call:
        """A call in the form that the other methods take, from the arguments of the U-Net's ``forward``."""
        return bind(self._original[0], args, kwargs)

    def program(self, call: Call) -> Program:
        """The graphs for the signature of ``call``; captured and rewritten on first use."""
        unet = self._original[0]
        if call.tensors[0].shape[1] != unet.config.in_channels:
            raise CaptureError(
                f"latents of {call.tensors[0].shape[1]} channels: this U-Net takes {unet.config.in_channels}"
            )
        if unet.training:
            raise CaptureError("the U-Net is in training mode: call unet.eval() first")
        if call.signature not in self._programs:
            self._programs[call.signature] = Program(lower(unet, call, self.sparsity), call)
        return self._programs[call.signature]

    @property
    def build_seconds(self) -> float:
        """Time spent so far on capturing and rewriting graphs."""
        return sum(program.lowered.build_seconds for program in self._programs.values())

    def record(
        self, call: Call, *, samples: int | None = None, activations: bool = True, attention: bool = False
    ) -> tuple[Tensor, Recorded]:
        """Run the dense U-Net and keep what sparse steps (``activations``) or controlled steps (``attention``) read.

        Returns:
            The noise prediction ``[B, C, H, W]`` and the cache of this call.
        """
        batch = call.signature.sample_shape[0]
        count = batch if samples is None else samples
        if not 1 <= count <= batch or batch % count:
            raise ValueError(f"samples={samples} of a batch of {batch}: give the number of pictures in it")
        self._drop_stale_programs()
        return self.program(call).record(call, samples=count, activations=activations, attention=attention)

    def controlled(self, call: Call, cache: StepCache, mapper: Tensor, keep: Tensor) -> Tensor:
        """Run the dense U-Net with the cross-attention maps of unchanged words taken from ``cache``.

        ``mapper`` and ``keep`` are those of :func:`~fisedit_compile.editing.prompt_to_prompt.align_batch`.
        """
        return self.program(call).controlled(call, cache, mapper, keep)

    def plan(self, call: Call, mask: Tensor) -> Prepared:
        """Everything about ``mask`` (bool ``[n, h, w]`` at latent resolution) that the steps of an edit share.

        Raises:
            MaskError: not bool, not ``[n, h, w]``, another resolution than the latents, n not a divisor of the batch.
        """
        self._drop_stale_programs()
        return self.program(call).prepare(mask)

    def _drop_stale_programs(self) -> None:
        """Capture anew after a weight or layer was replaced, as loading a LoRA or a state dict may do."""
        weights = _parameter_ids(self._original[0])
        if weights != self._weights:  # the graphs hold the old ones, so that no id can have been given twice
            self._programs.clear()
            self._weights = weights

    def step(self, call: Call, cache: StepCache, prepared: Prepared) -> Tensor:
        """One sparse step: active pixels anew, the rest from the base's ``cache`` of the same call.

        A mask of more than ``config.dense_above`` runs the dense U-Net instead, with the same meaning.

        Raises:
            BaseMismatchError: the cache was recorded by another model, for other activations or at another timestep.
        """
        program = self.program(call)
        if not isinstance(prepared, Prepared) or prepared.lowered is not program.lowered:
            raise BaseMismatchError("the plan is not of this call's graphs: pass what plan(call, mask) returned for it")
        if prepared.dense:
            return program.restore_base(self.unet(**call.kwargs, return_dict=False)[0], cache, prepared)
        return program.step(call, cache, prepared)

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """What became sparse, what stayed dense and why, module by module; for the arguments of a U-Net call."""
        from fisedit_compile.explain import explain

        program = self.program(self.call(*args, **kwargs))
        return explain(program.lowered, costs=program.row_costs if self.sparsity.blocks == "measured" else None)


def _parameter_ids(unet: torch.nn.Module) -> list[int]:
    """An id a parameter, in some order; ``unet.parameters()`` takes milliseconds, which every call would wait for."""
    ids: list[int] = []
    modules: list[torch.nn.Module | None] = [unet]
    while modules:
        module = modules.pop()
        if module is not None:
            ids += map(id, module._parameters.values())
            modules += module._modules.values()
    return ids
