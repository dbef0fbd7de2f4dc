"""Pass 10: linear layers that read the same value become one, of all their outputs side by side.

    %q = linear(%x, %wq, %bq); %k = linear(%x, %wk, %bk); %v = linear(%x, %wv, %bv)
->  %qkv = linear(%x, cat([%wq, %wk, %wv]), cat([%bq, %bk, %bv]))
    %q, %k, %v = split(%qkv)

One product of three times the width fills a GPU better than three products, and reads %x once. The weights are joined
in the stage ``constant``, once a model. The keys and values of all cross-attentions become one product in the same way,
as they read the same text. So do the projections of the time embedding in SDXL, where the pooled text enters it; for
that, the activation that each ResNet computes of the embedding for itself becomes one value first.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import common_path, make_call

aten = targets.aten


def merge_linears(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Join the linear layers of each value that several read."""
    report = PassReport("merge_linears")
    graph = graph_module.graph
    _share_activations(graph)
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in graph.find_nodes(op="call_function", target=targets.LINEAR):
        readers[node.args[0]].append(node)
    for linears in readers.values():
        if len(linears) == 1:
            continue
        if reason := _differ(linears):
            for node in linears:
                report.skip(node, reason)
            continue
        _merge(graph, linears)
        for node in linears:
            report.change(node)
    return report


def _share_activations(graph: Graph) -> None:
    """Let pointwise operations of one value, with equal arguments, become one operation."""
    first: dict[object, Node] = {}
    for node in list(graph.nodes):
        if node.target not in targets.UNARY or node.kwargs:
            continue
        shared = first.setdefault((node.target, node.args), node)
        if shared is not node:
            node.replace_all_uses_with(shared)
            graph.erase_node(node)


def _differ(linears: Sequence[Node]) -> str | None:
    """Why linear layers of one value cannot become one, in words; None where they can."""
    if len({arguments_of(node)["bias"] is None for node in linears}) > 1:
        return "only some of the layers that read this value have a bias"
    if any(_source(node.args[1]).op != "get_attr" for node in linears):
        return "its weight is computed"
    return None


def _merge(graph: Graph, linears: Sequence[Node]) -> None:
    first = linears[0]
    widths = [node.meta["val"].shape[-1] for node in linears]
    for node in linears[1:]:
        _bring_before(first, node.args[1:])
    path = common_path([each.meta["module_path"] for each in linears])
    layout = first.meta.get("row_layout")
    make = partial(make_call, graph, module_path=path)
    with graph.inserting_before(first):
        weight = make(aten.cat.default, ([node.args[1] for node in linears],))
        biases = [arguments_of(node)["bias"] for node in linears]
        bias = make(aten.cat.default, (biases,)) if biases[0] is not None else None
        merged = make(targets.LINEAR, (first.args[0], weight, bias), row_layout=layout)
        pieces = make(aten.split_with_sizes.default, (merged, widths, -1))
        for i, node in enumerate(linears):
            own = {"module_path": node.meta["module_path"], "row_layout": node.meta.get("row_layout")}
            node.replace_all_uses_with(make_call(graph, targets.GETITEM, (pieces, i), **own))
    for node in linears:
        graph.erase_node(node)


def _bring_before(first: Node, weights: Iterable[Any]) -> None:
    """Move the weights of a later layer, and what flattens them, in front of the layer ``first``."""
    for weight in weights:
        if isinstance(weight, Node) and weight > first:
            _bring_before(first, weight.args)
            first.prepend(weight)


def _source(weight: object) -> Node:
    """The parameter that a weight is; of a 1x1 convolution it is the one that was flattened."""
    assert isinstance(weight, Node)
    return weight if weight.target is not aten.flatten.using_ints else _source(weight.args[0])
