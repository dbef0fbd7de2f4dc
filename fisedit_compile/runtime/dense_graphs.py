"""The dense graphs of one U-Net: one that records what a base keeps, one that runs under Prompt-to-Prompt control."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from fisedit_compile.cache.step_cache import StepCache
from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.requests import CacheEntry, ControlTensor
from fisedit_compile.passes.dense.control_cross_attention import control_cross_attention, cross_attentions
from fisedit_compile.passes.dense.record_activations import record_activations
from fisedit_compile.runtime.cuda_graph import GraphRecorder, StaticStage
from fisedit_compile.runtime.stage import Stage


class DenseGraphs:
    """The dense graphs of an annotated U-Net, each made on first use; on a GPU each is one CUDA graph."""

    def __init__(self, dense: GraphModule, config: SparsityConfig, device: torch.device) -> None:
        self._dense, self._config = dense, config
        self._recorder = GraphRecorder(device)
        self._stages: dict[object, Stage | StaticStage] = {}

    @cached_property
    def attention_entries(self) -> list[CacheEntry]:
        """The cross-attention maps that the base has to keep of a call for a controlled dense step."""
        return [CacheEntry(node.name, "attention") for node in cross_attentions(self._dense)]

    def record(
        self, inputs: dict[Any, Tensor], entries: Sequence[CacheEntry], samples: int
    ) -> tuple[Tensor, dict[CacheEntry, Tensor]]:
        """The U-Net's output, and the value of each entry; ``samples`` of the batch are its conditional half."""

        def build() -> GraphModule:
            graph_module = copy_graph(self._dense)
            record_activations(graph_module, entries, samples)
            return graph_module

        out, kept = self._stage(("record", samples, tuple(entries)), build)(inputs)
        return out, dict(zip(entries, kept, strict=True))

    def controlled(self, inputs: dict[Any, Tensor], cache: StepCache, mapper: Tensor, keep: Tensor) -> Tensor:
        """The U-Net's output with the base's cross-attention maps of unchanged words.

        ``mapper`` and ``keep`` are those of :func:`~fisedit_compile.editing.prompt_alignment.align_batch`.
        """

        def build() -> GraphModule:
            graph_module = copy_graph(self._dense)
            control_cross_attention(graph_module, self._config)
            graph_module.recompile()
            return graph_module

        control: dict[Any, Tensor] = {ControlTensor("mapper"): mapper, ControlTensor("keep"): keep}
        result: Tensor = self._stage("control", build)({**inputs, **cache, **control})
        return result

    def _stage(self, key: object, build: Callable[[], GraphModule]) -> Stage | StaticStage:
        if key not in self._stages:
            stage = Stage(build(), compiled=self._config.compile)
            on_gpu = self._recorder.device.type == "cuda"
            self._stages[key] = StaticStage(stage, self._recorder) if on_gpu else stage
        return self._stages[key]


def copy_graph(graph_module: GraphModule) -> GraphModule:
    """A copy that shares parameters and node names, for the next rewriting."""
    graph = Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return GraphModule(graph_module, graph)
