"""One stage of a rewritten U-Net: a graph whose inputs are known by name or by request."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

from fisedit_compile.ir.requests import Hoisted


class StageGraph:
    """A dense graph, or one of the stages ``constant``, ``prompt``, ``fetch`` and ``step`` of a sparse one.

    Attributes:
        graph_module: the graph; it takes its inputs in the order of ``names``.
        names: of each placeholder, in order, the request of the pass that made it, or else its own name.
        outputs: of a hoisted stage, the requests by which later stages read its results, in the order of the results.
            Empty for a step and for a dense graph, which return the noise prediction.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        graph = graph_module.graph
        self.graph_module = graph_module
        self.names: list[Any] = [n.meta.get("request", n.target) for n in graph.find_nodes(op="placeholder")]
        stage = graph.output_node().meta.get("stage")
        self.outputs = [Hoisted(stage, name) for name in graph.output_node().meta.get("values", ())] if stage else []
