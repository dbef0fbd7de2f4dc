"""The recording graph: the dense graph that also returns what a sparse graph asks of the base.

    output(%noise)  ->  output((%noise, (tensors of the entries, in their order)))

A map is kept with one row a pixel, ``[B*H*W, *channels]``: so the gather of a halo and the scatter read it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from fisedit_compile.ir.requests import CacheEntry, Inputs
from fisedit_compile.kernels.attention.controlled_attention import attention_probabilities
from fisedit_compile.kernels.norms.group_norm_rows import norm_scale_shift
from fisedit_compile.kernels.norms.map_moments import moments_of_map
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import RowBuilder, norm_arguments

aten = targets.aten


def record_activations(
    graph_module: GraphModule, entries: Sequence[CacheEntry], samples: int, part: int = -1, tokens: int | None = None
) -> PassReport:
    """Add ``entries`` to the outputs of an annotated dense graph, in place.

    Args:
        graph_module: the graph; :func:`~fisedit_compile.passes.region.annotate_layout.annotate_layout` has run on it.
        entries: what the base keeps, each named after a node of this graph.
        samples: pictures in the batch, which guidance makes parts of ``samples`` each of.
        part: place of the conditional part in the U-Net's batch; -1 is the last.
        tokens: of how many tokens of the text attention maps are kept, the first ones; None keeps those of all.
    """
    report = PassReport("record_activations")
    graph = graph_module.graph
    inputs = Inputs(graph)
    by_name = {node.name: node for node in graph.nodes}
    output = graph.output_node()
    norms: dict[Node, Node] = {}
    recorded = []
    for entry in entries:
        node = by_name[entry.node]
        build = RowBuilder(graph, inputs, node)
        with graph.inserting_before(output):
            if entry.kind == "map":
                # A copy even where the map lies in this form already: it may be a view of an input or of the output,
                # which belong to the caller.
                contiguous = {"memory_format": torch.contiguous_format}
                recorded.append(build.call(aten.clone.default, build.pixels(node), **contiguous))
            elif entry.kind == "attention":
                options = {"samples": samples, "part": part, "tokens": tokens, "scale": node.kwargs.get("scale")}
                recorded.append(build.call(attention_probabilities, *node.args[:2], **options))
            elif entry.kind == "value":
                recorded.append(build.call(aten.clone.default, node, memory_format=torch.contiguous_format))
            elif entry.kind == "tiles":
                value, groups, *_ = norm_arguments(node)
                layout = value.meta["layout"]
                given = (build.pixels(value), inputs.batch, layout.size, groups)
                recorded.append(build.call(moments_of_map, *given))
            else:
                if node not in norms:
                    norms[node] = build.call(norm_scale_shift, *norm_arguments(node))
                recorded.append(build.call(targets.GETITEM, norms[node], ("scale", "shift").index(entry.kind)))
        report.change(node)
    output.args = ((output.args[0], tuple(recorded)),)
    graph_module.recompile()
    return report
