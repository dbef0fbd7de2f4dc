"""Replaces operations that write to a tensor by operations that return a new one.

The graph of ``torch.export`` keeps in-place operations, such as ``sample += residual`` with a T2I-Adapter or
``maps[:, :n] = ...`` with FreeU. Passes move operations about, which is only right for those without side effects.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from fisedit_compile.errors import CaptureError

aten = torch.ops.aten


def functionalize(graph: Graph) -> None:
    """Replace each operation that writes to a value which the graph computes, or to slices of one; changes ``graph``.

    Raises:
        CaptureError: an operation writes to an input, to a weight, to a view other than slices, or to a value that is
            read later through such a view; or there is no operation that does the same without writing.
    """
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            _replace(graph, node)


def _replace(graph: Graph, node: Node) -> None:
    position = {each: i for i, each in enumerate(graph.nodes)}
    owner, slices = node.args[0], []
    while isinstance(owner, Node) and owner.target is aten.slice.Tensor:
        slices.append(owner)
        owner = owner.args[0]
    assert isinstance(owner, Node)
    if not _is_fresh(owner):
        raise _refusal(node, f"to {owner}, which is an input, a weight or a view")
    others = {view for view in _views(owner) if position[view] < position[node]} - set(slices[:1])
    if any(position[user] > position[node] for view in others for user in view.users):
        raise _refusal(node, f"to {owner}, of which a view is read later")
    with graph.inserting_before(node):
        value = _functional(graph, node)
        whole = value
        for view in slices:
            source = view.args[0]
            assert isinstance(source, Node)
            whole = graph.call_function(aten.slice_scatter.default, (source, whole, *view.args[1:]))
            whole.meta = dict(node.meta, val=source.meta["val"])
    for old, new in ((owner, whole), *((view, value) for view in slices[:1])):
        old.replace_all_uses_with(new, delete_user_cb=lambda user: position.get(user, -1) > position[node])
    node.replace_all_uses_with(value)
    graph.erase_node(node)


def _functional(graph: Graph, node: Node) -> Node:
    """A new node before ``node`` that computes in new memory what the operation of ``node`` writes."""
    target: Any = node.target
    to = node.args[0]
    assert isinstance(to, Node)
    if target is aten.copy_.default:
        value = node.args[1]
        assert isinstance(value, Node)
        wanted, given = to.meta["val"], value.meta["val"]
        if given.dtype != wanted.dtype:
            value = graph.call_function(aten.to.dtype, (value, wanted.dtype))
            value.meta = dict(node.meta, val=given.to(wanted.dtype))
        if given.shape != wanted.shape:
            value = graph.call_function(aten.expand.default, (value, list(wanted.shape)))
            value.meta = dict(node.meta, val=wanted)
        return value
    name = target._schema.name.removeprefix("aten::").removesuffix("_")
    pure = getattr(getattr(aten, name, None), target._overloadname, None)
    if pure is None or pure._schema.is_mutable:
        raise _refusal(node, "and has no functional form")
    value = graph.call_function(pure, node.args, node.kwargs)
    value.meta = dict(node.meta)
    return value


def _is_fresh(node: Node) -> bool:
    """Whether a node's result has memory of its own, so that it is no view of another value."""
    is_op = isinstance(node.target, torch._ops.OpOverload)
    return is_op and all(result.alias_info is None for result in node.target._schema.returns)  # type: ignore[union-attr]


def _views(node: Node) -> set[Node]:
    """All other nodes whose result lies in the memory of ``node``'s result."""
    views = {user for user in node.users if user.op == "call_function" and not _is_fresh(user)}
    return views.union(*(_views(view) for view in views))


def _refusal(node: Node, why: str) -> CaptureError:
    return CaptureError(
        f"{node.target} in {node.meta.get('module_path') or 'the U-Net'} writes {why}: "
        "use its functional form; where an attention processor does it, call unet.set_default_attn_processor()"
    )
