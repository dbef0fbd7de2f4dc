"""A scatter of all pixels is a view: the rows of a resolution that is computed whole are its map already.

before:   %full = scatter_rows(%rows, %base, %index, shape, order, pixel_dims)
after:    %full = permute(reshape(%rows, [shape in the order of rows]), order turned round)
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.layout import inverse_permutation
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import make_call, prune

aten = torch.ops.aten


def unfold_whole_rows(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Replace the scatters at resolutions that are computed whole, and with them the base's maps that they read."""
    report = PassReport("unfold_whole_rows")
    graph = graph_module.graph
    for scatter in graph.find_nodes(op="call_function", target=targets.SCATTER_ROWS):
        if not config.is_whole(scatter.meta["layout"].size):
            continue
        given, path = arguments_of(scatter), scatter.meta["module_path"]
        shape = [given["shape"][dim] for dim in given["order"]]
        with graph.inserting_before(scatter):
            unfolded = make_call(graph, aten.reshape.default, (given["rows"], shape), module_path=path)
            order = list(inverse_permutation(given["order"]))
            full = make_call(graph, aten.permute.default, (unfolded, order), module_path=path)
        full.meta["layout"] = scatter.meta["layout"]
        scatter.replace_all_uses_with(full)
        report.change(scatter)
    prune(graph)
    return report
