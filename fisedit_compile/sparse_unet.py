"""``sparsify(unet)``: a drop-in for a diffusers U-Net that can also record a call and recompute a region of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.step_cache import Recorded, StepCache
from fisedit_compile.compiler.lower import lower
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import BaseMismatchError, CaptureError
from fisedit_compile.ir.call import Call, bind
from fisedit_compile.runtime.capturable import (
    bring_weights,
    refuse_autocast,
    refuse_uncapturable,
    settle_adapters,
    without_offload,
)
from fisedit_compile.runtime.control import Control
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.runtime.model_watch import ModelWatch
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.runtime.program import Program
from fisedit_compile.runtime.programs import Programs
from fisedit_compile.runtime.whole_steps import faster_as_rows


def sparsify(unet: torch.nn.Module, config: SparsityConfig | dict[str, Any] | None = None) -> SparseUNet:
    """Make a diffusers U-Net mask-aware.

    Args:
        unet: a ``UNet2DConditionModel``, or the result of ``torch.compile`` on one. It is not changed.
        config: a :class:`SparsityConfig`, a dict of its fields, or None for the defaults.

    Returns:
        A module that behaves as ``unet`` and has :meth:`SparseUNet.record`, :meth:`SparseUNet.prepare` and
        :meth:`SparseUNet.step`. Graphs are exported on first use, once for each signature of inputs.

    Raises:
        CaptureError: not a U-Net of this kind.
        ValueError: an unknown config field or value.
    """
    return SparseUNet(unet, SparsityConfig.of(config))


class SparseUNet(torch.nn.Module):
    """See :func:`sparsify`. Calling it runs the dense U-Net, exactly.

    It follows the U-Net: where adapters, processors, FreeU, hooks or weights have changed, graphs are exported anew or
    constants folded again, and what was recorded or planned before is refused, with the difference named. Each method
    looks for that, which takes some milliseconds; :meth:`looked_at` looks once for many calls.

    Attributes of the wrapped U-Net (``config``, ``dtype``, ``device``, ...) are its own.

    Attributes:
        build_seconds: time spent on exporting U-Nets and rewriting their graphs, all together.
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
        self._watch = ModelWatch(original)
        self._programs = Programs(self._build)
        self._lock = threading.RLock()
        self._held = threading.local()  # .state: within looked_at(), the state that was seen
        self._described = -1
        self.build_seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("unet"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense U-Net."""
        return self.unet(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Call:
        """A call in the form that the other methods take, from the arguments of the U-Net's ``forward``."""
        return bind(self._original[0], args, kwargs)

    def look(self) -> ModelState:
        """The state of the U-Net now: equal to an earlier one when it behaves alike and its weights are the same.

        Raises:
            CaptureError: the U-Net is in a state that no exported graph can stand for, such as group offloading.
        """
        return self._look(values=True)

    @contextmanager
    def looked_at(self) -> Iterator[ModelState]:
        """Look once for all calls within the context, of this thread: one that changes the U-Net there is not followed.

        Raises:
            CaptureError: see :meth:`look`.
        """
        refuse_autocast()
        before = getattr(self._held, "state", None)
        self._held.state = self.look()
        try:
            yield self._held.state
        finally:
            self._held.state = before

    def look_again(self) -> None:
        """Within :meth:`looked_at`, behind what may have changed the U-Net, a user's callback for example.

        Raises:
            BaseMismatchError: it is another one now.
        """
        if difference := self._held.state.difference(self.look()):
            raise BaseMismatchError(
                f"the U-Net was changed on the way ({difference}): all steps of a picture need the same one"
            )

    def program(self, call: Call) -> Program:
        """The graphs for the signature of ``call`` and the U-Net as it is; exported and rewritten on first use."""
        return self._program(call, self._ready(values=True))

    def free(self) -> None:
        """Let go of the graphs and their memory. The next call makes them anew; plans made before are refused."""
        with self._lock:
            self._programs.clear()

    def dense(self, call: Call) -> Tensor:
        """The noise prediction ``[B, C, H, W]`` of the dense U-Net.

        On a GPU in half precision it runs by operations on rows, as recorded and controlled calls do, which is faster;
        elsewhere the U-Net is called as the call was made.
        """
        if faster_as_rows(call.tensors[0]):
            return self._program(call, self._ready(values=True)).dense(call)
        args, kwargs = call.split()
        out: Tensor = self.unet(*args, **kwargs, return_dict=False)[0]
        return out

    def record(
        self,
        call: Call,
        *,
        samples: int | None = None,
        activations: bool = True,
        attention: bool = False,
        part: int = -1,
        tokens: int | None = None,
    ) -> tuple[Tensor, Recorded]:
        """Run the dense U-Net and keep what sparse steps (``activations``) or controlled steps (``attention``) read.

        Args:
            call: of :meth:`call`.
            samples: pictures in the batch, which guidance makes parts of ``samples`` each of; None is the whole batch.
            activations, attention: what is kept.
            part: place of the conditional part in the batch, whose attention maps are kept; -1 is the last.
            tokens: of how many tokens of the text, the first ones; None is all. Those of the prompt's own words take a
                fraction of the memory, and an edit's padding then shares what they leave.

        Returns:
            The noise prediction ``[B, C, H, W]`` and the cache of this call.
        """
        batch = call.signature.sample_shape[0]
        count = batch if samples is None else samples
        if not 1 <= count <= batch or batch % count:
            raise ValueError(f"samples={samples} of a batch of {batch}: give the number of pictures in it")
        state = self._ready(values=True)
        out, cache = self._program(call, state).record(
            call, samples=count, activations=activations, attention=attention, part=part, tokens=tokens
        )
        cache.model = state
        return out, cache

    def controlled(self, call: Call, cache: StepCache, control: Control) -> Tensor:
        """Run the dense U-Net with the cross-attention maps of unchanged words taken from ``cache``.

        Raises:
            BaseMismatchError: the cache was recorded by another model.
        """
        state = self._ready(values=True)
        _check_recorded(cache, state)
        return self._program(call, state).controlled(call, cache, control)

    def prepare(self, call: Call, mask: Tensor) -> Prepared:
        """Everything about ``mask`` (bool ``[n, h, w]`` at latent resolution) that the steps of an edit share.

        Raises:
            MaskError: not bool, not ``[n, h, w]``, another resolution than the latents, n not a divisor of the batch.
        """
        state = self._ready(values=True)
        prepared = self._program(call, state).prepare(mask)
        prepared.model = state
        return prepared

    def step(self, call: Call, cache: StepCache, prepared: Prepared, control: Control | None = None) -> Tensor:
        """One sparse step: active pixels anew, the rest from the base's ``cache`` of the same call.

        A mask of more than ``config.dense_above`` runs the dense U-Net instead, with the same meaning.

        Args:
            call: the call that the step stands for.
            cache: of :meth:`record`; with attention maps, where the step is controlled.
            prepared: of :meth:`prepare`.
            control: take the cross-attention maps of unchanged words from the cache; None leaves the edit its own.

        Raises:
            BaseMismatchError: the cache or the plan was made by another model, the cache for other activations or at
                another timestep.
        """
        program, state = self._check_plan(call, prepared)
        _check_recorded(cache, state)
        if prepared.dense:
            out = self.dense(call) if control is None else program.controlled(call, cache, control)
            return program.restore_base(out, cache, prepared)
        return program.step(call, cache, prepared, control)

    def check_plan(self, call: Call, prepared: Prepared) -> None:
        """Hold a plan to a call and to the U-Net as it is, as :meth:`step` does.

        Raises:
            BaseMismatchError: the plan was made by another model, or for other calls.
        """
        self._check_plan(call, prepared)

    def _check_plan(self, call: Call, prepared: Prepared) -> tuple[Program, ModelState]:
        """The program that a plan was made by, and the state of the U-Net."""
        # On a GPU, sampled values would be waited for; a plan was made with a look at them.
        state = self._ready(values=not call.tensors[0].is_cuda)
        if not isinstance(prepared, Prepared):
            raise BaseMismatchError(
                "the plan is not of this call's graphs: pass what prepare(call, mask) returned for it"
            )
        if prepared.model is not None and (difference := prepared.model.difference(state)):
            raise BaseMismatchError(
                f"the U-Net is another one than it was prepared for ({difference}): call prepare(call, mask) again"
            )
        program = self._program(call, state)
        if not program.owns(prepared):
            raise BaseMismatchError(
                "the plan is not of this call's graphs: pass what prepare(call, mask) returned for it"
            )
        return program, state

    def _look(self, *, values: bool) -> ModelState:
        unet = self._original[0]
        with self._lock:
            state = self._watch.look(values=values)
            if self._described != self._watch.descriptions:
                refuse_uncapturable(unet)
                settle_adapters(unet)
                state = self._watch.look(values=values)
                self._described = self._watch.descriptions
            return state

    def _ready(self, *, values: bool) -> ModelState:
        """The state in which a call runs, its weights on their device."""
        refuse_autocast()
        brought = bring_weights(self._original[0])
        held: ModelState | None = getattr(self._held, "state", None)
        if held is None:
            return self._look(values=values)
        if brought:
            self.look_again()
            self._held.state = self.look()
        return self._held.state

    def _program(self, call: Call, state: ModelState) -> Program:
        with self._lock:
            return self._programs.of(call, state)

    def _build(self, call: Call) -> Program:
        unet = self._original[0]
        if call.tensors[0].shape[1] != unet.config.in_channels:
            raise CaptureError(
                f"latents of {call.tensors[0].shape[1]} channels: this U-Net takes {unet.config.in_channels}"
            )
        start = time.perf_counter()
        with without_offload(unet):
            alone = self._watch.left_alone("the U-Net")
            lowered = lower(unet, call, self.sparsity, form=self._watch.form(), holding=alone)
        program = Program(lowered, lowered.weights_of(unet), call.tensors[0])
        self.build_seconds += time.perf_counter() - start
        return program

    def explain(self, *args: Any, **kwargs: Any) -> str:
        """What became sparse, what stayed dense and why, module by module; for the arguments of a U-Net call."""
        from fisedit_compile.explain import explain

        program = self.program(self.call(*args, **kwargs))
        return explain(program.lowered, costs=program.row_costs if self.sparsity.blocks == "measured" else None)


def _check_recorded(cache: StepCache, state: ModelState) -> None:
    model = getattr(cache, "model", None)
    if model is not None and (difference := model.difference(state)):
        raise BaseMismatchError(
            f"the U-Net is another one than the call was recorded with ({difference}): record the call again"
        )
