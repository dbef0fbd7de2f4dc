"""Pass 5: group norms of the region use the mean and variance of the base (approximate normalisation, paper A.2).

        gather(group_norm(%x, groups, %w, %b))
    ->  group_norm_rows(gather(%x), sample, base mean, base rstd, %w, %b)

The statistics of a map change little while most of it stays, and with them a norm needs no pixel but its own.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.passes import ops
from fisedit_compile.passes.report import PassReport
from fisedit_compile.passes.requests import CacheEntry
from fisedit_compile.passes.rewriting import RowBuilder, move_gathers
from fisedit_compile.plan import PlanTensor


def sparsify_norm(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Rewrite the group norms of the region. Layer norms see one row at a time: ``sparsify_pointwise`` takes them."""
    report = PassReport("sparsify_norm")
    move_gathers(graph_module, report, {ops.GROUP_NORM}, _group_norm_rows)
    return report


def _group_norm_rows(build: RowBuilder, norm: Node) -> Node:
    value = norm.args[0]
    assert isinstance(value, Node)
    weight, bias = (norm.args[i] if len(norm.args) > i else None for i in (2, 3))
    sample = build.inputs(PlanTensor("sample", norm.meta["layout"].size))
    mean, rstd = (build.inputs(CacheEntry(norm.name, kind)) for kind in ("mean", "rstd"))
    return build.call(ops.GROUP_NORM_ROWS, build.rows(value), sample, mean, rstd, weight, bias)
