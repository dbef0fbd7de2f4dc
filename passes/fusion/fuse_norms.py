"""Pass 12: norms of rows that no product took join with what is before them, and skip padding.

1.  group_norm_rows(%ab, ...) with %ab = cat([%a, %b])  ->  %ab, %normed = cat_norm_rows(%a, %b, ...)
2.  any other group_norm_rows(%x, ...)                  ->  group_norm_rows(%x, ..., count)
3.  layer_norm(%rows, [C], ...)                         ->  layer_norm_rows(%rows, ..., count)
4.  layer_norm_rows(linear_rows(%x, residual=%rows))    ->  %raw, %normed = linear_rows_and_layer_norm(%x, ...)

A skip connection is joined and normalised in one pass over its rows; a layer norm needs whole rows, which the second
kernel of a split product has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.layout import Layout
from fisedit_compile.ir.requests import Inputs
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import prune, row_count, stands_for

aten = targets.aten

#: What may be left, and why.
_LEFT: dict[Any, str] = {
    targets.GROUP_NORM_ROWS: "it follows no product and joins no two values",
    **dict.fromkeys(targets.CAT, "no norm with the base's statistics reads it"),
}


def fuse_norms(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Join the norms of rows that are left with concatenations and linear layers."""
    report = PassReport("fuse_norms")
    graph = graph_module.graph
    count_at = partial(row_count, Inputs(graph), config)
    _group_norms(graph, count_at, report)
    _layer_norms(graph, count_at, report)
    _layer_norms_into_linears(graph, report)
    prune(graph)
    for node in graph.nodes:
        if "rows" in node.meta and node.target in _LEFT:
            report.skip(node, _LEFT[node.target])
    return report


def _group_norms(graph: Graph, count_at: Callable[[Layout], Node | None], report: PassReport) -> None:
    """Cases 1 and 2."""
    for norm in graph.find_nodes(op="call_function", target=targets.GROUP_NORM_ROWS):
        rows, *rest = norm.args
        rest = [*rest[:3], len(rest) > 3 and rest[3], count_at(norm.meta["rows"])]
        parts = rows.args[0] if rows.target is aten.cat.default and rows.args[1:] == (1,) else ()
        if len(parts) != 2:
            norm.args = (rows, *rest)
            continue
        with graph.inserting_before(rows):
            both = graph.call_function(targets.CAT_NORM_ROWS, (*parts, *rest))
            both.meta.update(norm.meta)
            joined, normed = (graph.call_function(targets.GETITEM, (both, i)) for i in (0, 1))
        for new, old in ((normed, norm), (joined, rows)):
            new.meta.update(old.meta)
            old.replace_all_uses_with(new)
        report.change(rows)
        report.change(norm)


def _layer_norms(graph: Graph, count_at: Callable[[Layout], Node | None], report: PassReport) -> None:
    """Case 3."""
    for norm in graph.find_nodes(op="call_function", target=targets.LAYER_NORM):
        if "rows" not in norm.meta or len(norm.args[1]) != 1 or norm.meta["rows"].roles.count("c") != 1:
            continue
        args: list[Any] = [*norm.args, *(None, None, None, None, 1e-5)[len(norm.args) :]]
        rows, _, weight, bias, eps = args[:5]
        norm.target, norm.args = targets.LAYER_NORM_ROWS, (rows, weight, bias, eps, count_at(norm.meta["rows"]))
        report.change(norm)


def _layer_norms_into_linears(graph: Graph, report: PassReport) -> None:
    """Case 4."""
    for norm in graph.find_nodes(op="call_function", target=targets.LAYER_NORM_ROWS):
        product, weight, bias, eps, count = norm.args
        if product.target is not targets.LINEAR_ROWS:
            continue
        _, sample, sample_bias, residual, *rest = [*product.args[3:], *([None] * 7)][:7]
        if any(each not in (None, "none") for each in (sample, sample_bias, *rest)):
            continue
        later = [each for each in (weight, bias) if isinstance(each, Node) and product < each]
        if any(each.op != "get_attr" for each in later):
            continue  # computed behind the product
        for each in later:
            product.prepend(each)
        with graph.inserting_before(product):
            both = graph.call_function(
                targets.LINEAR_ROWS_AND_LAYER_NORM, (*product.args[:3], residual, weight, bias, eps, count)
            )
            both.meta.update(product.meta)
            raw, normed = (graph.call_function(targets.GETITEM, (both, i)) for i in (0, 1))
        stands_for(normed, norm, product)
        stands_for(raw, product, product)
        report.change(norm)
