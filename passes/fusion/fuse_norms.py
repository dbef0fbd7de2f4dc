"""Pass 12: the norms of rows that no product took join what is before them, and skip padded rows.

1.  group_norm_rows(%ab, ...) with %ab = cat([%a, %b])  ->  %ab, %normed = cat_norm_rows(%a, %b, ...)
2.  any other group_norm_rows(%x, ...)                  ->  group_norm_rows(%x, ..., count)
3.  layer_norm(%rows, [C], ...)                         ->  layer_norm_rows(%rows, ..., count)
4.  layer_norm_rows(linear_rows(%x, residual=%rows))    ->  %raw, %normed = linear_rows_and_layer_norm(%x, ...)

Case 1 joins and normalises a skip connection in one pass over its rows. Case 4 needs whole rows, which the second
kernel of a split product has at hand.
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
from fisedit_compile.passes.arguments import arguments_of, call_form
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import has_the_base_s_statistics, make_call, prune, row_count
from fisedit_compile.passes.row_product import RowProduct

aten = targets.aten

CountAt = Callable[[Layout], Node | None]

#: Operations that this pass may leave as they are, with the reason that it reports.
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
        if "row_layout" in node.meta and node.target in _LEFT:
            report.skip(node, _LEFT[node.target])
    return report


def _group_norms(graph: Graph, count_at: CountAt, report: PassReport) -> None:
    """Cases 1 and 2."""
    for norm in graph.find_nodes(op="call_function", target=targets.GROUP_NORM_ROWS):
        given = {**arguments_of(norm), "count": count_at(norm.meta["row_layout"])}
        rows = given["rows"]
        parts: Any = rows.args[0] if rows.target is aten.cat.default and rows.args[1:] == (1,) else ()
        if len(parts) != 2 or not has_the_base_s_statistics(norm):
            norm.args, norm.kwargs = call_form(norm.target, given)
            continue
        del given["rows"]
        args, kwargs = call_form(targets.CAT_NORM_ROWS, {"left": parts[0], "right": parts[1], **given})
        with graph.inserting_before(rows):
            both = make_call(graph, targets.CAT_NORM_ROWS, args, kwargs, **_place(norm))
            joined = make_call(graph, targets.GETITEM, (both, 0), **_place(rows))
            normed = make_call(graph, targets.GETITEM, (both, 1), **_place(norm))
        norm.replace_all_uses_with(normed)
        rows.replace_all_uses_with(joined)
        report.change(rows)
        report.change(norm)


def _layer_norms(graph: Graph, count_at: CountAt, report: PassReport) -> None:
    """Case 3."""
    for norm in graph.find_nodes(op="call_function", target=targets.LAYER_NORM):
        layout = norm.meta.get("row_layout")
        given = arguments_of(norm)
        if layout is None or len(given["normalized_shape"]) != 1 or layout.roles.count("c") != 1:
            continue
        arguments = {"rows": given["input"], **{name: given[name] for name in ("weight", "bias", "eps")}}
        norm.target = targets.LAYER_NORM_ROWS
        norm.args, norm.kwargs = call_form(norm.target, {**arguments, "count": count_at(layout)})
        report.change(norm)


def _layer_norms_into_linears(graph: Graph, report: PassReport) -> None:
    """Case 4."""
    for norm in graph.find_nodes(op="call_function", target=targets.LAYER_NORM_ROWS):
        given = arguments_of(norm)
        node = given["rows"]
        if node.target is not targets.LINEAR_ROWS:
            continue
        product = RowProduct(node)
        if set(product.epilogue) - {"residual"}:
            continue
        later = [each for each in (given["weight"], given["bias"]) if isinstance(each, Node) and node < each]
        if any(each.op != "get_attr" for each in later):
            continue  # computed behind the product
        for each in later:
            node.prepend(each)
        arguments = {name: product[name] for name in ("rows", "weight", "bias", "residual")}
        arguments |= {"norm_weight": given["weight"], "norm_bias": given["bias"], "eps": given["eps"]}
        args, kwargs = call_form(targets.LINEAR_ROWS_AND_LAYER_NORM, {**arguments, "count": given["count"]})
        with graph.inserting_before(node):
            both = make_call(graph, targets.LINEAR_ROWS_AND_LAYER_NORM, args, kwargs, **_place(node))
            raw, normed = (make_call(graph, targets.GETITEM, (both, i), **_place(node)) for i in (0, 1))
        norm.replace_all_uses_with(normed)
        node.replace_all_uses_with(raw)
        report.change(norm)


def _place(node: Node) -> dict[str, Any]:
    """The module of an operation on rows, and where its rows lie: for an operation that takes its place."""
    return {key: node.meta[key] for key in ("module_path", "row_layout")}
