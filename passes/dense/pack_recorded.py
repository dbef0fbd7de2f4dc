"""Packing: what a recording graph returns of maps is their rows in few bits a value.

    output((%noise, (%rows, ...)))
->  output((%noise, (pack_rows(%rows, bits), ...)))
->  output((%noise, (pack_rows(mean_of_tiles(%rows, size), bits), ...)))     keys and values by the tile
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from torch.fx import GraphModule, Node

from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.kernels.indexing.packed_rows import mean_of_tiles
from fisedit_compile.kernels.indexing.row_format import RowFormat
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import make_call, prune


def pack_recorded(
    graph_module: GraphModule, entries: Sequence[CacheEntry], formats: Mapping[CacheEntry, RowFormat]
) -> PassReport:
    """Pack the entries that have a format, in place.

    Args:
        graph_module: a graph that returns the noise prediction and the value of each entry.
        entries: what it returns, in this order.
        formats: of those that are packed.
    """
    report = PassReport("pack_recorded")
    graph = graph_module.graph
    output = graph.output_node()
    noise, values = cast("tuple[Node, tuple[Node, ...]]", output.args[0])
    packed = []
    for entry, value in zip(entries, values, strict=True):
        if (form := formats.get(entry)) is None:
            packed.append(value)
            continue
        # A copy of the whole rows, which some recordings make for those who keep them, would only be read here.
        rows = value.args[0] if value.target in (targets.aten.contiguous.default, targets.aten.clone.default) else value
        path = value.meta["module_path"]
        with graph.inserting_before(output):
            if form.size is not None:
                rows = make_call(graph, mean_of_tiles, (rows, form.size), module_path=path)
            packed.append(make_call(graph, targets.PACK_ROWS, (rows, form.bits), module_path=path))
        report.change(value)
    output.args = ((noise, tuple(packed)),)
    prune(graph)
    graph_module.recompile()
    return report
