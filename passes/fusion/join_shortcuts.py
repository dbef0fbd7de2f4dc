"""Pass 13: a ResNet's 1x1 shortcut becomes more depth of the convolution that it is added to.

    conv2d_rows(%h, ..., %w, %b, %table, residual=linear_rows(%x, %v, %c))
->  conv2d_rows(%h, ..., %w, add(%b, %c), %table, shortcut=%x, shortcut_weight=%v)

The convolution and the shortcut add up to the same output, so one product can run over the depth of both. That is one
launch less, and the shortcut's result is neither stored nor read again.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import common_path, make_call, prune
from fisedit_compile.passes.row_product import RowProduct


def join_shortcuts(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Let each convolution of rows whose residual is a linear layer of rows take in that layer."""
    report = PassReport("join_shortcuts")
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target not in targets.CONVOLUTIONS_OF_ROWS:
            continue
        conv = RowProduct(node)
        residual = conv["residual"]
        if residual is None or residual.target is not targets.LINEAR_ROWS:
            continue
        shortcut = RowProduct(residual)
        if len(residual.users) > 1:
            report.skip(residual, "its result is read elsewhere, too")
        elif shortcut.epilogue:
            report.skip(residual, "something follows it before the sum")
        else:
            _join(graph, conv, shortcut)
            report.change(residual)
    prune(graph)
    return report


def _join(graph: Graph, conv: RowProduct, shortcut: RowProduct) -> None:
    path = common_path([conv.node.meta["module_path"], shortcut.node.meta["module_path"]])
    conv.node.meta["module_path"] = path
    conv.rewrite(
        bias=_sum(graph, conv, conv["bias"], shortcut["bias"]),
        residual=None,
        shortcut=shortcut["rows"],
        shortcut_weight=shortcut["weight"],
    )


def _sum(graph: Graph, conv: RowProduct, bias: Node | None, other: Node | None) -> Node | None:
    """Both biases in one; the stage ``constant`` adds them, once a model."""
    if bias is None or other is None:
        return bias or other
    with graph.inserting_before(conv.node):
        return make_call(graph, targets.aten.add.Tensor, (bias, other), module_path=conv.node.meta["module_path"])
