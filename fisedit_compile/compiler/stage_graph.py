"""A graph with the names of what it takes and returns, so that a caller can look up its inputs."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule

from fisedit_compile.ir.requests import Hoisted, Inputs, Weight


class StageGraph:
    """A dense graph, or one of the stages ``constant``, ``prompt``, ``fetch`` and ``step`` of a sparse one.

    It holds no weights: those that it reads are among its inputs, so that all models of the same form can share it.

    Args:
        graph_module: the graph, which is rewritten; its weights are attributes.

    Attributes:
        graph_module: the graph; it takes its inputs in the order of ``names``.
        names: one entry for each placeholder, in order: the request that it carries, or else its own name, which is
            that of an input of the U-Net.
        outputs: for ``constant``, ``prompt`` and ``fetch``, the requests by which later stages read the results, in the
            order of the results. Empty for a step and for a dense graph, which return the noise prediction.
    """

    def __init__(self, graph_module: GraphModule) -> None:
        graph = graph_module.graph
        _take_weights_as_inputs(graph)
        self.graph_module = _LazyGraphModule({}, graph)
        _LazyGraphModule.force_recompile(self.graph_module)  # torch.compile takes the code that there is
        self.names: list[Any] = [n.meta.get("request", n.target) for n in graph.find_nodes(op="placeholder")]
        stage = graph.output_node().meta.get("stage")
        self.outputs = [Hoisted(stage, name) for name in graph.output_node().meta.get("values", ())] if stage else []


def _take_weights_as_inputs(graph: Graph) -> None:
    inputs = Inputs(graph)
    for node in graph.find_nodes(op="get_attr"):
        node.replace_all_uses_with(inputs(Weight(str(node.target)), node.meta.get("val")))
        graph.erase_node(node)
