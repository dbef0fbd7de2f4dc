"""Dense calls of a U-Net by operations on rows: plain, recorded and controlled, each one CUDA graph on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.step_cache import StepCache
from fisedit_compile.cache.tensors_in_memory import Piece
from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.compiler.whole import WholeGraphs, lower_whole
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.runtime.constants import Constants
from fisedit_compile.runtime.control import Control, ControlBuffers
from fisedit_compile.runtime.cuda_graph import GraphCapturer, StaticStage, copied
from fisedit_compile.runtime.kept_copies import KeptCopies
from fisedit_compile.runtime.prompt_values import PromptValues
from fisedit_compile.runtime.stage import Stage


def faster_as_rows(sample: Tensor) -> bool:
    """Whether dense calls with these latents are faster by operations on rows: on a GPU in half precision.

    In single precision row kernels have no matrix units, and a CPU convolves whole maps twice as fast.
    """
    return sample.is_cuda and sample.dtype.itemsize == 2


class WholeSteps:
    """The graphs of a lowered U-Net in which every pixel is a row, each made on first use.

    Args:
        lowered: the U-Net.
        constants: what its graphs share; those of these graphs are added to it.
        capturer: of the device that they run on.
    """

    def __init__(self, lowered: Lowered, constants: Constants, capturer: GraphCapturer) -> None:
        self._lowered, self._constants, self._capturer = lowered, constants, capturer
        self._steps: dict[object, _WholeStep] = {}
        self._kept: dict[object, KeptCopies] = {}

    def dense(self, inputs: dict[Any, Tensor]) -> Tensor:
        """The U-Net's output."""
        out: Tensor = self._step("dense", lambda: lower_whole(self._lowered)).run(inputs)
        return out

    def record(
        self, inputs: dict[Any, Tensor], entries: Sequence[CacheEntry], samples: int, part: int, tokens: int | None
    ) -> tuple[Tensor, dict[CacheEntry, Tensor], Piece | None]:
        """See :meth:`~fisedit_compile.runtime.dense_graphs.DenseGraphs.record`.

        The graph makes the maps of all tokens, and of these are copied away those that are asked for, so that prompts
        of any length have one graph.
        """
        key = ("record", samples, part, tuple(entries))
        step = self._step(key, lambda: lower_whole(self._lowered, entries, samples=samples, part=part))
        if key not in self._kept:
            self._kept[key] = KeptCopies(entries)

        def own(values: tuple[Tensor, Sequence[Tensor]]) -> tuple[Tensor, dict[CacheEntry, Tensor], Piece | None]:
            out, kept = values
            return copied(out), *self._kept[key].take(kept, tokens)

        result: tuple[Tensor, dict[CacheEntry, Tensor], Piece | None] = step.run(inputs, own=own)
        return result

    def controlled(self, inputs: dict[Any, Tensor], cache: StepCache, control: Control) -> Tensor:
        """The U-Net's output with the base's cross-attention maps of unchanged words."""
        out: Tensor = self._step("control", lambda: lower_whole(self._lowered, control=True)).run(
            inputs, cache, control
        )
        return out

    def forget(self) -> None:
        """Capture CUDA graphs anew: the weights have moved."""
        for step in self._steps.values():
            step.forget()
        self._kept.clear()

    def _step(self, key: object, build: Callable[[], WholeGraphs]) -> _WholeStep:
        if key not in self._steps:
            self._steps[key] = _WholeStep(build(), self._lowered, self._constants, self._capturer)
        return self._steps[key]


class _WholeStep:
    """One of the graphs; arguments as of :class:`WholeSteps`."""

    def __init__(self, graphs: WholeGraphs, lowered: Lowered, constants: Constants, capturer: GraphCapturer) -> None:
        self._constants, self._capturer = constants, capturer
        self._prompt_stage, self._step = (Stage(graphs.stages[name], compiled=False) for name in ("prompt", "step"))
        constants.add(Stage(graphs.stages["constant"], compiled=False))
        with torch.inference_mode(False):
            self._plan = {request: tensor.to(capturer.device) for request, tensor in graphs.plan.items()}
        specs = lowered.control_specs if graphs.controlled else {}
        self._control = ControlBuffers(graphs.controlled, specs, lowered.batch, capturer.device)
        self._prompt = PromptValues()
        self._static: StaticStage | None = None

    def run(
        self,
        inputs: dict[Any, Tensor],
        cache: StepCache | None = None,
        control: Control | None = None,
        own: Callable[[Any], Any] | None = None,
    ) -> Any:
        """What the graph returns, in memory of its own; ``own`` see :meth:`StaticStage.__call__`."""
        with self._capturer.in_turn():
            if control is not None:
                assert cache is not None
                self._control.bring(control, cache)
            prompt = self._prompt.refresh(self._prompt_stage, inputs, self._constants)
            if self._static is None or self._capturer.device.type != "cuda":  # where nothing is replayed, maps move
                fixed = {**self._constants.values, **self._plan, **self._control.values}
                self._static = StaticStage(self._step, self._capturer, fixed)
            return self._static({**inputs, **prompt}, own)

    def forget(self) -> None:
        self._static, self._prompt = None, PromptValues()
