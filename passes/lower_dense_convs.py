"""Pass 9, CPU alone: small dense convolutions run as one gather and one matrix product too.

        conv2d(%x, %w, %b)                           [B, C, 8, 8], say
    ->  conv2d_rows(pixels of %x, None, packed(%w), %b, table of every pixel), viewed as a map again

oneDNN brings the weight of a convolution into its own blocked format at every call. With few pixels that costs more
than the product: 1280 -> 1280 at 8x8, batch 2, fp32, two threads take 97 ms so, 138 ms with channels-last weights,
151 ms as NCHW and 238 ms with a channels-last input and plain weights, which is what a scatter leaves. At 512 pixels
both are equal. cuDNN has no such cost, so on CUDA nothing changes.
"""

from __future__ import annotations

import math
import re

import torch
from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.neighbour_table import neighbour_table
from fisedit_compile.passes import ops
from fisedit_compile.passes.report import PassReport
from fisedit_compile.passes.requests import Inputs
from fisedit_compile.passes.rewriting import RowBuilder, prune
from fisedit_compile.passes.sparsify_conv import geometry_of, pack_weight
from fisedit_compile.plan import Taps

aten = ops.aten

#: Output pixels of all samples up to which the product was the faster of the two.
MOST_PIXELS = 256


def lower_dense_convs(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Rewrite the convolutions that stayed dense, where a product is faster."""
    report = PassReport("lower_dense_convs")
    graph = graph_module.graph
    inputs = Inputs(graph)
    for conv in graph.find_nodes(op="call_function", target=ops.CONV):
        if "layout" not in conv.meta or "dense" in conv.meta or conv.meta["val"].device.type != "cpu":
            continue
        batch, channels, height, width = conv.meta["val"].shape
        if batch * height * width > MOST_PIXELS:
            report.skip(conv, f"more than {MOST_PIXELS} pixels: oneDNN is as fast")
            continue
        build = RowBuilder(graph, inputs, conv.meta["module_path"])
        with graph.inserting_before(conv):
            rows = _all_pixels(graph_module, build, conv)
            rows.meta["rows"] = conv.meta["layout"]
            full = build.call(aten.view.default, rows, [batch, height, width, channels])
            full = build.call(aten.permute.default, full, [0, 3, 1, 2])
        full.meta.update(val=conv.meta["val"], layout=conv.meta["layout"])
        conv.replace_all_uses_with(full)
        report.change(conv)
    prune(graph)
    return report


def _all_pixels(graph_module: GraphModule, build: RowBuilder, conv: Node) -> Node:
    source, weight = conv.args[:2]
    assert isinstance(source, Node)
    assert isinstance(weight, Node)
    size, batch = conv.meta["layout"].size, conv.meta["val"].shape[0]
    kernel = tuple(weight.meta["val"].shape[2:])
    taps = Taps(source.meta["layout"].size, size, kernel=kernel, **geometry_of(conv), dense=True)
    name = "_".join(("dense_table", *re.findall(r"\d+", repr(taps))))
    if not hasattr(graph_module, name):
        table, _ = neighbour_table(taps, torch.arange(batch * math.prod(size)), None, batch)
        graph_module.register_buffer(name, table, persistent=False)
    bias = conv.args[2] if len(conv.args) > 2 else None
    table_node = build.graph.get_attr(name)
    return build.call(ops.CONV2D_ROWS, build.pixels(source), None, pack_weight(build, weight), bias, table_node)
