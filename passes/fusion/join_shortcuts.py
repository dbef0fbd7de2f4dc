"""Pass 13: a ResNet's 1x1 shortcut becomes more depth of the convolution that it is added to.

    conv2d_rows(%h, ..., %w, %b, %table, residual=linear_rows(%x, %v, %c))
->  conv2d_rows(%h, ..., %w, add(%b, %c), %table, beside=%x, beside_weight=%v)

Both sums run over the same output, so that one product can run over both: one launch less, and the shortcut is neither
stored nor read again.
"""

from __future__ import annotations

from torch.fx import Graph, GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import common_path, prune

aten = targets.aten

#: Where the arguments of a convolution are, and what those behind its product are without being given.
_BIAS, _RESIDUAL = 3, 8
_EPILOGUE = (None, None, None, None, None, None, "none")


def join_shortcuts(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Let each convolution of rows whose residual is a linear layer of rows take in that layer."""
    report = PassReport("join_shortcuts")
    graph = graph_module.graph
    for conv in list(graph.nodes):
        if conv.target not in (targets.CONV2D_ROWS, targets.CONV2D_ROWS_AND_NORM) or len(conv.args) <= _RESIDUAL:
            continue
        shortcut = conv.args[_RESIDUAL]
        if not isinstance(shortcut, Node) or shortcut.target is not targets.LINEAR_ROWS:
            continue
        if len(shortcut.users) > 1:
            report.skip(shortcut, "its result is read elsewhere, too")
        elif len(shortcut.args) > 4:
            report.skip(shortcut, "something follows it before the sum")
        else:
            _join(graph, conv, shortcut)
            report.change(shortcut)
    prune(graph)
    return report


def _join(graph: Graph, conv: Node, shortcut: Node) -> None:
    rows, side_weight, side_bias = shortcut.args[:3]
    path = common_path([conv.meta["module_path"], shortcut.meta["module_path"]])
    conv.meta["module_path"] = path
    bias = conv.args[_BIAS] or side_bias
    if conv.args[_BIAS] is not None and side_bias is not None:
        with graph.inserting_before(conv):
            bias = graph.call_function(aten.add.Tensor, (conv.args[_BIAS], side_bias))
        bias.meta["module_path"] = path
    arguments = [*conv.args, *_EPILOGUE[len(conv.args) - 5 :], rows, side_weight]
    arguments[_BIAS], arguments[_RESIDUAL] = bias, None
    conv.args = tuple(arguments)
