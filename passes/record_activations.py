"""The record graph: the dense graph that also returns what a sparse graph asks of the base.

    output(%noise)  ->  output((%noise, (tensors of the entries, in their order)))

Maps are kept pixel-major ``[B*H*W, *channels]``, as the halo gather and the scatter read them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from fisedit_compile.passes import ops
from fisedit_compile.passes.report import PassReport
from fisedit_compile.passes.requests import CacheEntry, Inputs
from fisedit_compile.passes.rewriting import RowBuilder
from fisedit_compile.prompt_to_prompt import attention_probabilities

aten = ops.aten


def record_activations(graph_module: GraphModule, entries: Sequence[CacheEntry], samples: int) -> PassReport:
    """Add ``entries`` to the outputs of an annotated dense graph; ``samples`` of the batch are its conditional half."""
    report = PassReport("record_activations")
    graph = graph_module.graph
    inputs = Inputs(graph)
    by_name = {node.name: node for node in graph.nodes}
    output = graph.output_node()
    statistics: dict[Node, Node] = {}
    recorded = []
    for entry in entries:
        node = by_name[entry.node]
        build = RowBuilder(graph, inputs, node.meta["module_path"])
        with graph.inserting_before(output):
            if entry.kind == "map":
                # A copy even where the map lies pixel-major already: it may be a view of an input or of the output,
                # which belong to the caller.
                contiguous = {"memory_format": torch.contiguous_format}
                recorded.append(build.call(aten.clone.default, build.pixels(node), **contiguous))
            elif entry.kind == "attention":
                scale = node.kwargs.get("scale")
                recorded.append(build.call(attention_probabilities, *node.args[:2], samples=samples, scale=scale))
            else:
                if node not in statistics:
                    groups, eps = node.args[1], node.args[4] if len(node.args) > 4 else 1e-5
                    statistics[node] = build.call(group_norm_statistics, node.args[0], groups, eps)
                recorded.append(build.call(ops.GETITEM, statistics[node], ("mean", "rstd").index(entry.kind)))
        report.change(node)
    output.args = ((output.args[0], tuple(recorded)),)
    graph_module.recompile()
    return report


def group_norm_statistics(x: torch.Tensor, groups: int, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and reciprocal standard deviation of a map ``[B, C, H, W]``, each ``[B, groups]``, in fp32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide.reshape(x.shape[0], groups, -1), dim=2, correction=0)
    return mean, torch.rsqrt(variance + eps)
