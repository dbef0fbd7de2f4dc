"""A graph that takes its inputs by name or request, from a dict of values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fisedit_compile.ir.requests import Hoisted


class Stage:
    """A dense graph, or one of the stages ``constant``, ``prompt``, ``fetch`` and ``step`` of a sparse one.

    Attributes:
        graph_module: the graph, which runs as it is or through ``torch.compile``.
        names: of its placeholders, in order: the request of what a pass made, else the name.
        outputs: of a hoisted stage, the requests by which later stages read its results.
    """

    def __init__(self, graph_module: GraphModule, *, compiled: bool) -> None:
        graph = graph_module.graph
        self.graph_module = graph_module
        self.names: list[Any] = [n.meta.get("request", n.target) for n in graph.find_nodes(op="placeholder")]
        stage = graph.output_node().meta.get("stage")
        self.outputs = [Hoisted(stage, name) for name in graph.output_node().meta.get("values", ())] if stage else []
        self._run: Callable[..., Any] = torch.compile(graph_module) if compiled else graph_module

    def __call__(self, values: Mapping[Any, Tensor], *, eagerly: bool = False) -> Any:
        """Run the graph; ``eagerly`` where its compiled form would be compiled again for one mask alone."""
        run = self.graph_module if eagerly else self._run
        with torch.no_grad():
            return run(*(values[name] for name in self.names))

    def values(self, values: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """The outputs of a hoisted stage, by the requests of the stages that read them."""
        return dict(zip(self.outputs, self(values), strict=True)) if self.outputs else {}
