"""Pass 7: operations that work on each pixel alone run on rows: activations, sums, linear layers, layer norms, views.

    gather(silu(%x))                       ->  silu(gather(%x))
    gather(add(%x, %y))                    ->  add(gather(%x), gather(%y))
    gather(add(%x, %temb[B, C, 1, 1]))     ->  add(gather(%x), temb[sample])      one row of temb for each pixel
    gather(linear(%x, %w, %b))             ->  linear(gather(%x), %w, %b)
    gather(cat([%x, %y], 1))               ->  cat([gather(%x), gather(%y)], 1)
    gather(chunk(%x, 2, -1)[0])            ->  chunk(gather(%x), 2, -1)[0]
    gather(permute(%x)), gather(view(%x))  ->  gather(%x), its channels regrouped where the view regroups them
    gather(contiguous(%x))                 ->  gather(%x)

Rows have no dimensions of space, so that transposes and views between maps, tokens and heads vanish.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch.fx import GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.layout import Layout
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import RowBuilder, move_gathers, permutation

aten = targets.aten


def sparsify_pointwise(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Rewrite every operation of the region whose result at a pixel depends on that pixel alone."""
    report = PassReport("sparsify_pointwise")
    for operations, build in (
        (targets.UNARY | {targets.LINEAR, targets.LAYER_NORM}, _first_operand),
        (targets.COPY, lambda build, op: build.rows(op.args[0])),
        (targets.BINARY, _binary),
        (targets.CAT, _cat),
        ({targets.GETITEM}, partial(_piece, made={})),
        (targets.VIEW, _view),
        (targets.PERMUTE, _permute),
    ):
        move_gathers(graph_module, report, operations, build)
    return report


def _first_operand(build: RowBuilder, op: Node) -> Node:
    return build.form(op.target, build.rows(op.args[0]), *op.args[1:], **op.kwargs)  # type: ignore[arg-type]


def _binary(build: RowBuilder, op: Node) -> Node:
    layout: Layout = op.meta["layout"]
    operands = [_operand(build, arg, layout) if isinstance(arg, Node) else arg for arg in op.args[:2]]
    return build.form(op.target, *operands, *op.args[2:], **op.kwargs)  # type: ignore[arg-type]


def _operand(build: RowBuilder, value: Node, layout: Layout) -> Node:
    """An operand on rows: the rows of a spatial one; of one without space, its sample's value for each row."""
    if "layout" in value.meta:
        return build.rows(value)
    rank, shape = len(layout.roles), tuple(value.meta["val"].shape)
    if not shape:
        return value
    padded = (1,) * (rank - len(shape)) + shape
    batch, channels = padded[layout.roles.index("b")], layout.channels(padded)
    if padded != shape or layout.order != tuple(range(rank)):
        value = build.call(aten.reshape.default, value, list(padded))
        value = build.call(aten.permute.default, value, list(layout.order))
    value = build.call(aten.reshape.default, value, [batch, *channels])
    if batch == 1:  # [1, *channels] broadcasts over all rows
        return value
    return build.call(aten.index_select.default, value, 0, build.inputs(PlanTensor("sample", layout.size)))


def _cat(build: RowBuilder, op: Node) -> Node:
    dim = op.meta["layout"].row_dim(arguments_of(op)["dim"])
    return build.form(op.target, [build.rows(part) for part in op.args[0]], dim)  # type: ignore[arg-type, union-attr]


def _piece(build: RowBuilder, op: Node, made: dict[Node, Node]) -> Node:
    """One piece of a chunk. The chunk on rows is made for the first piece, and kept in ``made`` for the others."""
    chunk, number = op.args
    assert isinstance(chunk, Node)
    if chunk not in made:
        dim = chunk.meta["layout"].row_dim(arguments_of(chunk)["dim"])
        rows = build.rows(chunk.args[0])  # type: ignore[arg-type]
        split: Any = chunk.target
        made[chunk] = build.call(split, rows, chunk.args[1], dim)
    return build.form(targets.GETITEM, made[chunk], number)


def _view(build: RowBuilder, op: Node) -> Node:
    value = op.args[0]
    assert isinstance(value, Node)
    old = value.meta["layout"].channels(value.meta["val"].shape)
    new = op.meta["layout"].channels(op.meta["val"].shape)
    rows = build.rows(value)
    if old == new:
        return rows
    if len(old) > 1:  # not by a view to [-1, ...], which is ambiguous where a mask gives no row at all
        rows = build.call(aten.flatten.using_ints, rows, 1)
    return build.form(aten.unflatten.int, rows, 1, list(new)) if len(new) > 1 else rows


def _permute(build: RowBuilder, op: Node) -> Node:
    value = op.args[0]
    assert isinstance(value, Node)
    rows = build.rows(value)
    before = [dim for dim, role in enumerate(value.meta["layout"].roles) if role == "c"]
    after = [dim for dim in permutation(op) if dim in before]
    if before == after:
        return rows
    return build.form(aten.permute.default, rows, [0, *(1 + before.index(dim) for dim in after)])
