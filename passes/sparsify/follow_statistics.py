"""Behind pass 5, for masks that change much of a picture: the statistics of group norms follow the edit.

    group_norm_rows(%rows, sample, base scale, base shift)
->  %moments = tile_moments(%rows, tiles, groups)
    %scale, %shift = followed_statistics(%moments, tile ids, tile sizes, base tiles, base scale, ...)
    group_norm_rows(%rows, sample, %scale, %shift)

The base keeps moments of each norm's input over tiles of the picture. Those of tiles that are covered by rows are taken
off and those of the rows put in their place. It costs two launches a norm, and the norm cannot join the product before
it.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.fx import Graph, GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, Inputs
from fisedit_compile.ir.tile_grid import TILES
from fisedit_compile.kernels.norms.tile_moments import moments_dtype
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of, call_form
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import has_the_base_s_statistics, make_call


def follow_statistics(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Let norms with the base's statistics take those of what the picture becomes."""
    report = PassReport("follow_statistics")
    inputs = Inputs(graph_module.graph)
    for norm in graph_module.graph.find_nodes(op="call_function", target=targets.GROUP_NORM_ROWS):
        if has_the_base_s_statistics(norm):
            _follow(graph_module.graph, inputs, norm)
            report.change(norm)
    return report


def _follow(graph: Graph, inputs: Inputs, norm: Node) -> None:
    given, size = arguments_of(norm), norm.meta["row_layout"].size
    rows, scale, shift = given["rows"], given["scale"], given["shift"]
    groups, weight, bias, eps = norm.meta["norm"]
    batch = scale.meta["val"].shape[0]
    plan = {kind: inputs(PlanTensor(kind, size)) for kind in ("tiles", "tile_ids", "tile_sizes")}
    moments = torch.empty(batch * TILES, groups, 2, dtype=moments_dtype(rows.meta["val"].dtype), device="meta")
    base = inputs(CacheEntry(scale.meta["request"].node, "tiles"), moments)
    make = partial(make_call, graph, module_path=norm.meta["module_path"])
    with graph.inserting_before(norm):
        found = make(targets.TILE_MOMENTS, (rows, plan["tiles"], groups))
        of_tiles = (found, plan["tile_ids"], plan["tile_sizes"], base)
        both = make(targets.FOLLOWED_STATISTICS, (*of_tiles, scale, shift, weight, bias, eps))
        given["scale"], given["shift"] = (make(targets.GETITEM, (both, i)) for i in (0, 1))
    norm.args, norm.kwargs = call_form(norm.target, given)
