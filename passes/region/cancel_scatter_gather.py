"""Pass 8: a gather of what was just scattered at the same resolution is the rows themselves.

before:   %full = scatter_rows(%rows, %base, %index)
          %again = gather_rows(%full, %index)
after:    users of %again read %rows; %full stays only if something dense reads it
"""

from __future__ import annotations

from torch.fx import GraphModule

from fisedit_compile.config import SparsityConfig
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import prune


def cancel_scatter_gather(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Remove every such pair, and then what nobody reads any more: operations, maps of the base, plan tensors."""
    report = PassReport("cancel_scatter_gather")
    graph = graph_module.graph
    for gather in graph.find_nodes(op="call_function", target=targets.GATHER_ROWS):
        wanted = arguments_of(gather)
        scatter = wanted["x"]
        if scatter.target is not targets.SCATTER_ROWS:
            report.skip(gather, "its value is dense: the region begins here")
            continue
        given = arguments_of(scatter)
        if any(given[name] != wanted[name] for name in ("index", "order", "pixel_dims")):
            report.skip(gather, "it reads other pixels than were scattered")
        else:
            gather.replace_all_uses_with(given["rows"])
            report.change(gather)
    prune(graph)
    return report
