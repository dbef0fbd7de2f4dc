"""The dense graphs of one U-Net: one that records what a base keeps, one that runs under Prompt-to-Prompt control."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.cache.step_cache import StepCache
from fisedit_compile.cache.tensors_in_memory import Piece
from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.compiler.stage_graph import StageGraph
from fisedit_compile.ir.requests import CacheEntry, Weight
from fisedit_compile.runtime.control import KEEP, MAPPER, WEIGHT, Control
from fisedit_compile.runtime.cuda_graph import GraphCapturer, StaticStage
from fisedit_compile.runtime.stage import Stage


class DenseGraphs:
    """The dense graphs of a lowered U-Net, each made on first use; on a GPU each is one CUDA graph.

    Args:
        lowered: the U-Net.
        weights: what its graphs read, where it lies.
        device: where they run.
    """

    def __init__(self, lowered: Lowered, weights: Mapping[Weight, Tensor], device: torch.device) -> None:
        self._lowered, self._weights = lowered, weights
        self._capturer = GraphCapturer(device)
        self._stages: dict[object, Callable[[Mapping[Any, Tensor]], Any]] = {}

    def record(
        self, inputs: dict[Any, Tensor], entries: Sequence[CacheEntry], samples: int, part: int, tokens: int | None
    ) -> tuple[Tensor, dict[CacheEntry, Tensor], Piece | None]:
        """The U-Net's output, the value of each entry, and the piece of memory in which most of them lie, if one does.

        The batch consists of parts of ``samples`` each, of which the one at place ``part`` is conditional. Attention
        maps are of the first ``tokens`` of the text; None is all.
        """
        key = ("record", samples, part, tokens, tuple(entries))
        out, kept = self._stage(key, lambda: self._lowered.recording(entries, samples, part, tokens))(inputs)
        return out, dict(zip(entries, kept, strict=True)), None

    def controlled(self, inputs: dict[Any, Tensor], cache: StepCache, control: Control) -> Tensor:
        """The U-Net's output with the base's cross-attention maps of unchanged words."""
        part = control.part
        result: Tensor = self._stage(("control", part), lambda: self._lowered.controlled(part))(
            {**inputs, **cache, MAPPER: control.mapper, KEEP: control.keep, WEIGHT: control.weights}
        )
        return result

    def forget(self) -> None:
        """Capture CUDA graphs anew: the weights have moved."""
        for stage in self._stages.values():
            if isinstance(stage, StaticStage):
                stage.forget()

    def _stage(self, key: object, build: Callable[[], StageGraph]) -> Callable[[Mapping[Any, Tensor]], Any]:
        if key not in self._stages:
            stage = Stage(build(), compiled=self._lowered.config.compile)
            if self._capturer.device.type == "cuda":
                self._stages[key] = StaticStage(stage, self._capturer, self._weights)
            else:
                self._stages[key] = lambda values: stage({**values, **self._weights})
        return self._stages[key]
