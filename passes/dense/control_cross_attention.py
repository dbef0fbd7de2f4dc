"""The control graph: the dense graph whose cross-attention keeps the base's maps of unchanged words (paper 3.1).

        attention(%q, %k, %v)           %k, %v from the text
    ->  controlled_attention(%q, %k, %v, base maps, %control_mapper, %control_keep,
                                weight=%control_weight)

It runs the dense steps of an edit under Prompt-to-Prompt control (Hertz et al. 2022), which is for the conditional half
of the batch alone.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.requests import CacheEntry, ControlTensor, Inputs
from fisedit_compile.kernels.attention.controlled_attention import controlled_attention
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import RowBuilder
from fisedit_compile.passes.text_attention import control_vals, text_attentions


def control_cross_attention(graph_module: GraphModule, config: SparsityConfig, part: int = -1) -> PassReport:
    """Let every cross-attention of an annotated dense graph take the base's maps, in place.

    Args:
        graph_module: the graph.
        config: what was made sparse and how.
        part: place of the conditional part in the U-Net's batch; -1 is the last.
    """
    report = PassReport("control_cross_attention")
    graph = graph_module.graph
    inputs = Inputs(graph)
    for node in text_attentions(graph_module.graph):
        maps, mapper, keep, weight = _control_inputs(inputs, node)
        build = RowBuilder(graph, inputs, node)
        with graph.inserting_before(node):
            options = {"scale": node.kwargs.get("scale"), "part": part, "weight": weight}
            controlled = build.call(controlled_attention, *node.args[:3], maps, mapper, keep, **options)
        controlled.meta["layout"] = node.meta["layout"]
        node.replace_all_uses_with(controlled)
        graph.erase_node(node)
        report.change(node)
    return report


def _control_inputs(inputs: Inputs, attention: Node) -> tuple[Node, Node, Node, Node]:
    vals = control_vals(attention)
    return (
        inputs(CacheEntry(attention.name, "attention"), vals["maps"]),
        inputs(ControlTensor("mapper"), vals["mapper"]),
        inputs(ControlTensor("keep"), vals["keep"]),
        inputs(ControlTensor("weight"), vals["weight"]),
    )
