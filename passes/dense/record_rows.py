"""Recording by rows: the graph in which every pixel is a row also returns what a sparse graph asks of the base.

:func:`keep_values` adds the values to the outputs of the dense graph; the passes of the sparse graph make rows of them
as of any other value. :func:`record_rows` then takes from each what the base keeps:

    output((%noise, (scatter_rows(%rows, ...), ...)))
->  output((%noise, (%rows, ...)))                            a map
->  output((%noise, (%scale, ...)))                           of %rows = group_norm_rows(%x, %sample, %scale, %shift)
->  output((%noise, (cross_attention_maps(%q, %k, ...), ...)))    of %rows = attention_rows(%q, %k, %v, ...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, Inputs
from fisedit_compile.kernels.attention.controlled_rows import cross_attention_maps
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import make_call, prune

aten = targets.aten


def keep_values(graph_module: GraphModule, entries: Sequence[CacheEntry]) -> None:
    """Add the dense value that each of ``entries`` is taken from to the outputs of a dense graph, in place."""
    by_name = {node.name: node for node in graph_module.graph.nodes}
    output = graph_module.graph.output_node()
    output.args = ((output.args[0], tuple(by_name[entry.node] for entry in entries)),)


def record_rows(
    entries: Sequence[CacheEntry], samples: int, part: int = -1
) -> Callable[[GraphModule, SparsityConfig], PassReport]:
    """A pass that lets a graph of rows return ``entries``, in the place of the values of :func:`keep_values`.

    Args:
        entries: those that :func:`keep_values` was given.
        samples: pictures in the batch, which guidance makes parts of ``samples`` each of.
        part: place of the conditional part in the U-Net's batch; -1 is the last.
    """

    def record_rows(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
        report = PassReport("record_rows")
        graph = graph_module.graph
        output = graph.output_node()
        noise, values = cast("tuple[Node, tuple[Node, ...]]", output.args[0])
        recorded = []
        for entry, value in zip(entries, values, strict=True):
            rows = arguments_of(value)["rows"] if value.target is targets.SCATTER_ROWS else value
            with graph.inserting_before(output):
                recorded.append(_kept(graph_module, entry, rows, samples=samples, part=part))
            report.change(value)
        output.args = ((noise, tuple(recorded)),)
        prune(graph)
        return report

    return record_rows


def _kept(graph_module: GraphModule, entry: CacheEntry, rows: Node, **maps: Any) -> Node:
    """What a base keeps of a value, given its rows."""
    graph, path = graph_module.graph, rows.meta["module_path"]
    if entry.kind in ("map", "value"):  # a piece of a wider product is copied out of it
        return make_call(graph, aten.contiguous.default, (rows,), module_path=path)
    given = arguments_of(rows)
    if entry.kind == "attention":
        arguments = (given["q"], given["k"], given["scale"])
        return make_call(
            graph, cross_attention_maps, arguments, {**maps, "batch": Inputs(graph).batch}, module_path=path
        )
    if entry.kind == "tiles":
        tiles = Inputs(graph)(PlanTensor("tiles", rows.meta["row_layout"].size))
        norm = given if "groups" in given else arguments_of(given["scale"].args[0])
        return make_call(graph, targets.TILE_MOMENTS, (given["rows"], tiles, norm["groups"]), module_path=path)
    if rows.target is targets.GROUP_NORM_ROWS:
        kept: Node = given[entry.kind]
        return kept
    own = [given[name] for name in ("rows", "samples", "groups", "weight", "bias", "eps")]  # of group_norm_whole
    both = make_call(graph, targets.GROUP_NORM_STATISTICS, own, module_path=path)
    return make_call(graph, targets.GETITEM, (both, ("scale", "shift").index(entry.kind)), module_path=path)
