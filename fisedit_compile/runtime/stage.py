"""A stage of a lowered U-Net that runs, eagerly or through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fisedit_compile.compiler.stage_graph import StageGraph


class Stage:
    """Runs a :class:`~fisedit_compile.compiler.stage_graph.StageGraph` on values given by name or request.

    Args:
        graph: what runs.
        compiled: run it through ``torch.compile``.
    """

    def __init__(self, graph: StageGraph, *, compiled: bool) -> None:
        self.graph_module: GraphModule = graph.graph_module
        self.names = graph.names
        self.outputs = graph.outputs
        self._run: Callable[..., Any] = torch.compile(self.graph_module) if compiled else self.graph_module

    def __call__(self, values: Mapping[Any, Tensor], *, eagerly: bool = False) -> Any:
        """Run the graph; ``eagerly`` where its compiled form would be compiled again for one mask alone."""
        run = self.graph_module if eagerly else self._run
        with torch.no_grad():
            return run(*(values[name] for name in self.names))

    def values(self, values: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """The outputs of a hoisted stage, by the requests of the stages that read them."""
        return dict(zip(self.outputs, self(values), strict=True)) if self.outputs else {}
