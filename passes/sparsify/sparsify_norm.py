"""Pass 5: group norms of the region use the mean and variance of the base (approximate normalisation, paper A.2).

1.  Where the mask decides which pixels are rows:
        gather(group_norm(%x, groups, %w, %b))
    ->  group_norm_rows(gather(%x), sample, base scale, base shift)
    ``scale`` and ``shift`` are ``[B, C]`` and combine the base's statistics with the norm's weight and bias. Statistics
    of a map change little while most of the map stays, and with given ones a norm needs no pixel but its own.
2.  Where every pixel is a row (``config.is_whole``), the norm has all pixels and takes its own statistics:
    ->  group_norm_whole(gather(%x), samples, groups, %w, %b, eps)
    and, where there are more pixels than one kernel takes well,
    ->  group_norm_rows(gather(%x), sample, scale, shift)
        with scale, shift = group_norm_statistics(gather(%x), samples, groups, %w, %b, eps)
"""

from __future__ import annotations

from functools import partial
from math import prod

import torch
from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import RowBuilder, move_gathers, norm_arguments

#: Pixels of a map up to which one program a group reads it all.
_PIXELS_OF_ONE_KERNEL = 256


def sparsify_norm(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Rewrite the group norms of the region. ``sparsify_pointwise`` takes layer norms, which need one row at a time."""
    report = PassReport("sparsify_norm")
    move_gathers(graph_module, report, {targets.GROUP_NORM}, partial(_group_norm, config=config))
    return report


def _group_norm(build: RowBuilder, norm: Node, *, config: SparsityConfig) -> Node:
    value, groups, weight, bias, eps = norm_arguments(norm)
    size = norm.meta["layout"].size
    val = norm.meta["val"]
    if config.is_whole(size):
        given = (build.rows(value), val.shape[0], groups, weight, bias, eps)
        if prod(size) <= _PIXELS_OF_ONE_KERNEL:
            return build.form(targets.GROUP_NORM_WHOLE, *given)
        both = build.call(targets.GROUP_NORM_STATISTICS, *given)
        scale, shift = (build.call(targets.GETITEM, both, i) for i in (0, 1))
        return build.form(targets.GROUP_NORM_ROWS, given[0], build.inputs(PlanTensor("sample", size)), scale, shift)
    vectors = torch.empty(val.shape[:2], dtype=torch.promote_types(val.dtype, torch.float32), device="meta")  # [B, C]
    scale, shift = (build.inputs(CacheEntry(norm.name, kind), vectors) for kind in ("scale", "shift"))
    form = build.form(
        targets.GROUP_NORM_ROWS, build.rows(value), build.inputs(PlanTensor("sample", size)), scale, shift
    )
    form.meta["norm"] = groups, weight, bias, eps  # which follow_statistics reads
    return form
