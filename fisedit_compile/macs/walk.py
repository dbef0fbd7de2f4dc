"""Counts the MACs of one flat FX graph node by node, so that they can be told apart by operator, resolution and module.

fvcore can count the same graph as a check. Both use :mod:`fisedit_compile.macs.formulas`; if they differ, that is an
error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fisedit_compile.compiler.export import module_path
from fisedit_compile.errors import CaptureError
from fisedit_compile.ir.meta_interpreter import MetaInterpreter
from fisedit_compile.macs.formulas import FORMULAS, OP_KINDS, is_refused
from fisedit_compile.macs.report import NO_RESOLUTION, MacCount, by_area
from fisedit_compile.macs.tracing import fvcore_by_kind

aten = torch.ops.aten


def count_graph(graph_module: GraphModule, inputs: Sequence[Tensor], *, check: bool = True) -> MacCount:
    """MACs of one run of a flat FX graph of ATen and ``fisedit`` operators.

    Args:
        graph_module: resolutions are read from ``meta["layout"]`` or ``meta["row_layout"]``, module paths from
            ``meta["module_path"]``.
        inputs: one tensor for each placeholder, on any device. Only their shapes count, except that row offsets should
            have values, see :func:`fisedit_compile.macs.formulas.attention_rows`.
        check: whether the count is compared with fvcore's, which takes many times as long.

    Raises:
        CaptureError: an operation that multiplies and accumulates has no formula.
    """
    return GraphCounter(graph_module, check=check).count(inputs)[0]


class GraphCounter:
    """Counts one graph for inputs of any sizes; with ``check``, the first count is compared with fvcore's."""

    def __init__(self, graph_module: GraphModule, *, check: bool = True) -> None:
        self._graph_module = graph_module
        self._check = check

    def count(self, inputs: Sequence[Tensor]) -> tuple[MacCount, Any]:
        """The MACs of a run of the graph, and what it returns on the meta device; see :func:`count_graph`."""
        walk = _Walk(self._graph_module, inputs)
        with torch.no_grad():
            out = walk.run(*(tensor.to("meta") for tensor in inputs))
        by_op: dict[str, int] = {kind: walk.by_op[kind] for kind in OP_KINDS}
        if self._check:
            fvcore = fvcore_by_kind(self._graph_module, inputs)
            if any(fvcore[kind] != by_op[kind] for kind in OP_KINDS):
                raise AssertionError(f"fvcore counts {dict(fvcore)} where the graph's nodes have {by_op}")
            self._check = False
        by_resolution = dict(sorted(walk.by_resolution.items(), key=by_area))
        return MacCount(by_op, by_resolution, dict(walk.by_module)), out


class _Walk(MetaInterpreter):
    """Counts the MACs of each node while it runs a graph on the meta device."""

    def __init__(self, graph_module: GraphModule, inputs: Sequence[Tensor]) -> None:
        super().__init__(graph_module)
        self.by_op: Counter[str] = Counter()
        self.by_resolution: Counter[str] = Counter()
        self.by_module: Counter[str] = Counter()
        placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
        self._given = dict(zip(placeholders, inputs, strict=True))

    def run_node(self, n: Node) -> Any:
        out = super().run_node(n)
        if not isinstance(n.target, torch._ops.OpOverload):
            return out
        name = n.target._schema.name
        path = n.meta.get("module_path") or module_path(n)
        if is_refused(name):
            raise CaptureError(f"{name} in {path or 'the graph'} has no MAC formula: add one to macs/formulas.py")
        if name in FORMULAS:
            self._count(n, name, path, out)
        return out

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        shape = _SHAPES.get(target)
        return shape(*args) if shape else super().call_function(target, args, kwargs)

    def _count(self, node: Node, name: str, path: str, out: Any) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), lambda arg: self._given.get(arg, self.env[arg]))
        macs = FORMULAS[name].macs(out, *args, **kwargs)
        layout = node.meta.get("layout") or node.meta.get("row_layout")
        self.by_op[FORMULAS[name].kind] += macs
        self.by_resolution["{}x{}".format(*layout.size) if layout else NO_RESOLUTION] += macs
        self.by_module[path] += macs


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


#: Computes the results of operators whose shapes torch works out slowly on the meta device, through decompositions in
#: Python. Without these a walk over a sparse step of Stable Diffusion 2 takes three times as long.
_SHAPES: dict[Any, Callable[..., Tensor]] = {
    aten.linear.default: lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    aten.layer_norm.default: _like_first,
    aten.group_norm.default: _like_first,
    aten.gelu.default: _like_first,
}
