"""What the passes share: how to make, move, read and remove operations so that what holds between passes holds on.

``passes/README.md`` lists what that is. A pass makes its operations by :func:`make_call` or a :class:`RowBuilder`,
which give each its ``meta``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.layout import Layout
from fisedit_compile.ir.meta_interpreter import on_meta, shape_of_call
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import Inputs
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.pass_report import PassReport

aten = targets.aten


def make_call(
    graph: Graph,
    target: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    module_path: str,
    row_layout: Layout | None = None,
    val: Any = None,
) -> Node:
    """A new operation at the graph's insertion point, with its ``meta``.

    Args:
        graph: the graph under rewriting.
        target: the operator, or a function of tensors that runs on the meta device.
        args, kwargs: its arguments; nodes among them need ``meta["val"]``.
        module_path: the module that the operation belongs to in reports.
        row_layout: where the rows lie if the result is rows, see ``meta["row_layout"]``.
        val: a tensor of the result's shape and dtype, where they are known; None works them out.
    """
    node = graph.call_function(target, tuple(args), dict(kwargs or {}))
    if val is None:
        given, named = map_arg((node.args, node.kwargs), lambda arg: on_meta(arg.meta["val"]))
        val = shape_of_call(target, given, named)
    node.meta.update(val=val, module_path=module_path, added=True)
    if row_layout is not None:
        node.meta["row_layout"] = row_layout
    return node


def gather(graph: Graph, value: Node, index: Node) -> Node:
    """A gather of the active pixels of a dense spatial value, at the graph's insertion point."""
    layout: Layout = value.meta["layout"]
    args = (value, index, list(layout.order), layout.pixel_dims)
    place = {"module_path": value.meta["module_path"], "row_layout": layout}
    return make_call(graph, targets.GATHER_ROWS, args, **place, val=rows_val(value))


def rows_val(value: Node) -> Tensor:
    """A tensor on the meta device for ``meta["val"]`` of the rows of a dense spatial value, every pixel among them."""
    val = value.meta["val"]
    return torch.empty(value.meta["layout"].pixel_major(val.shape), dtype=val.dtype, device="meta")


class RowBuilder:
    """Builds what takes the place of one operation: its form on rows, and all that this form reads.

    Args:
        graph: the graph under rewriting; operations are made at its insertion point.
        inputs: the placeholders of the graph.
        op: the operation that is replaced.
    """

    def __init__(self, graph: Graph, inputs: Inputs, op: Node) -> None:
        self.graph = graph
        self.inputs = inputs
        self._op = op

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """An operation that the row form reads, see :func:`make_call`."""
        return make_call(self.graph, target, args, kwargs, module_path=self._op.meta["module_path"])

    def form(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """The row form itself: its result is the rows of what the operation gives."""
        op = self._op
        place = {"module_path": op.meta["module_path"], "row_layout": op.meta["layout"]}
        return make_call(self.graph, target, args, kwargs, **place, val=rows_val(op))

    def rows(self, value: Node) -> Node:
        """The active pixels of a spatial value. If a scatter made the value, the two cancel in a later pass."""
        return gather(self.graph, value, self.inputs(PlanTensor("index", value.meta["layout"].size)))

    def pixels(self, value: Node) -> Node:
        """All pixels of a dense value as rows, ``[B*H*W, *channels]``: a view where the channels lie last already."""
        layout = value.meta["layout"]
        permuted = self.call(aten.permute.default, value, list(layout.order))
        return self.call(aten.flatten.using_ints, permuted, 0, layout.pixel_dims - 1)


def move_gathers(
    graph_module: GraphModule,
    report: PassReport,
    of_targets: Collection[object],
    build: Callable[[RowBuilder, Node], Node],
) -> None:
    """Replace ``gather_rows(op(...))`` by ``build(builder, op)`` for every ``op`` of ``of_targets`` in the region."""
    graph = graph_module.graph
    inputs = Inputs(graph)
    for node in graph.find_nodes(op="call_function", target=targets.GATHER_ROWS):
        op = node.args[0]
        if op.target not in of_targets or not op.meta.get("region"):
            continue
        with graph.inserting_before(node):
            new = build(RowBuilder(graph, inputs, op), op)
        new.meta["row_layout"] = op.meta["layout"]
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        report.change(op)


def prune(graph: Graph) -> None:
    """Remove what nobody reads: operations, and placeholders, those of the U-Net's own inputs among them."""
    # Without ``eliminate_dead_code``, for which attention is impure, and which checks the whole graph each time.
    for node in reversed(graph.nodes):
        if not node.users and node.op != "output":
            graph.erase_node(node)


def row_count(inputs: Inputs, config: SparsityConfig, layout: Layout) -> Node | None:
    """The input that tells kernels how many rows of a resolution are real; None where every pixel is a row."""
    return None if config.is_whole(layout.size) else inputs(PlanTensor("count", layout.size))


def common_path(paths: Sequence[str]) -> str:
    """The innermost module that contains all of ``paths``: the path of an operation that does the work of several."""
    shared = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def only_user(node: Node) -> Node | None:
    """The operation that reads a value, where exactly one does."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def permutation(node: Node) -> tuple[int, ...]:
    """The dimensions of a ``permute`` or ``transpose`` node, as a permutation."""
    rank = node.meta["val"].ndim
    if node.target is aten.transpose.int:
        a, b = (int(dim) % rank for dim in node.args[1:3])  # type: ignore[arg-type]
        dims = list(range(rank))
        dims[a], dims[b] = b, a
        return tuple(dims)
    return tuple(dim % rank for dim in node.args[1])  # type: ignore[union-attr]


def has_the_base_s_statistics(node: Node) -> bool:
    """Whether an operation is a group norm of rows with the base's statistics: it can join what it norms.

    With statistics of its own it waits for all rows.
    """
    return node.target is targets.GROUP_NORM_ROWS and arguments_of(node)["scale"].op == "placeholder"


def norm_arguments(norm: Node) -> tuple[Node, int, Node | None, Node | None, float]:
    """Input, groups, weight, bias and eps of an ``aten.group_norm`` node."""
    given = arguments_of(norm)
    return given["input"], given["num_groups"], given["weight"], given["bias"], given["eps"]


def is_timestep(placeholder: Node) -> bool:
    """Whether an input of the U-Net is its timestep: a number, or one for each sample that is no class label."""
    if "request" in placeholder.meta or "layout" in placeholder.meta or "class_labels" in str(placeholder.target):
        return False
    return bool(placeholder.meta["val"].ndim < 2)
