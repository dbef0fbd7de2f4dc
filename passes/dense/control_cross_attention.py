"""The control graph: the dense graph whose cross-attention keeps the base's maps of unchanged words (paper 3.1).

        attention(%q, %k, %v)           %k, %v from the text
    ->  controlled_attention(%q, %k, %v, base maps, %control_mapper, %control_keep,
                                weight=%control_weight)

It runs the dense steps of an edit under Prompt-to-Prompt control (Hertz et al. 2022), which is for the conditional half
of the batch alone.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.requests import CacheEntry, ControlTensor, Inputs
from fisedit_compile.kernels.attention.controlled_attention import controlled_attention
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import RowBuilder


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
    for node in cross_attentions(graph_module):
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
    """The base's maps of one cross-attention, the prompts' alignments, and the weights of tokens.

    Their ``meta["val"]`` has a sample of the pictures for each of the batch, as without classifier-free guidance.
    """
    query, key = (node.meta["val"] for node in attention.args[:2])  # type: ignore[union-attr]
    batch, heads, pixels, _ = query.shape
    tokens = key.shape[2]

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    return (
        inputs(CacheEntry(attention.name, "attention"), empty(batch, heads, pixels, tokens, dtype=query.dtype)),
        inputs(ControlTensor("mapper"), empty(batch, tokens, tokens)),
        inputs(ControlTensor("keep"), empty(batch, tokens)),
        inputs(ControlTensor("weight"), empty(batch, tokens)),
    )


def cross_attentions(graph_module: GraphModule) -> list[Node]:
    """The cross-attentions of an annotated graph: their queries lie in space, and their keys do not."""
    nodes = graph_module.graph.find_nodes(op="call_function", target=targets.ATTENTION)
    return [node for node in nodes if "layout" in node.args[0].meta and "layout" not in node.args[1].meta]
