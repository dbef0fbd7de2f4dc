"""A graph with the names of what it takes and returns, so that a caller can look up its inputs."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule

from fisedit_compile.ir.requests import Hoisted


class StageGraph:
    """A dense graph, or one of the stages ``constant``, ``prompt``, ``fetch`` and ``step`` of a sparse one.

    Attributes:
        graph_module: the graph; it takes its inputs in the order of ``names``.
        names: one entry for each placeholder, in order: the request that it carries, or else its own name, which is
            that of an input of the U-Net.
        outputs: for ``constant``, ``prompt`` and ``fetch``, the requests by which later stages read the results, in the
            order of the results. Empty for a step and for a dense graph, which return the noise prediction.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        _LazyGraphModule.force_recompile(graph_module)  # torch.compile takes the code that there is
        graph = graph_module.graph
        self.graph_module = graph_module
        self.names: list[Any] = [n.meta.get("request", n.target) for n in graph.find_nodes(op="placeholder")]
        stage = graph.output_node().meta.get("stage")
        self.outputs = [Hoisted(stage, name) for name in graph.output_node().meta.get("values", ())] if stage else []
