"""Pass 3: put a gather and a scatter around every value of the region.

    before:   %y = op(%x)                         all users read %y
    after:    %y = op(%x)
              %rows = gather_rows(%y, %index)     [M, *channels]: the active pixels of %y
              %full = scatter_rows(%rows, %base)  the base's %y with the active pixels replaced; all users read %full

This pass alone fixes what the sparse graph means: *outside the mask every value of the region is the base's*. The graph
still computes as much as before. The ``sparsify_*`` passes then move each gather in front of its operation
(``gather(op(x)) -> row_op(gather(x))``), and ``cancel_scatter_gather`` removes the pairs that meet and what nobody
reads any more. What is left decides which maps the base has to keep.
"""

from __future__ import annotations

from torch.fx import GraphModule

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.layout import Layout
from fisedit_compile.ir.meta_interpreter import on_meta
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, Inputs
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import gather, make_call, rows_val


def insert_gather_scatter(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Wrap every value marked ``meta["region"]``."""
    report = PassReport("insert_gather_scatter")
    graph = graph_module.graph
    inputs = Inputs(graph)
    for node in [node for node in graph.nodes if node.meta.get("region")]:
        layout: Layout = node.meta["layout"]
        index, count = (inputs(PlanTensor(kind, layout.size)) for kind in ("index", "count"))
        val, path = node.meta["val"], node.meta["module_path"]
        base = inputs(CacheEntry(node.name, "map"), rows_val(node))
        users = list(node.users)
        with graph.inserting_after(node):
            rows = gather(graph, node, index)
        with graph.inserting_after(rows):
            args = (rows, base, index, list(val.shape), list(layout.order), layout.pixel_dims)
            full = make_call(graph, targets.SCATTER_ROWS, args, {"count": count}, module_path=path, val=on_meta(val))
        full.meta["layout"] = layout
        for user in users:
            user.replace_input_with(node, full)
        report.change(node)
    return report
