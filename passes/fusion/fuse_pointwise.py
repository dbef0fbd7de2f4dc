"""Pass 11: what follows a product of rows pixel by pixel is done before the product is stored (``kernels/epilogue``).

1.  A linear layer of rows becomes ``linear_rows``, which can take an epilogue as ``conv2d_rows`` can.
2.  silu(group_norm_rows(%x, ...))                   ->  group_norm_rows(%x, ..., silu)          and group_norm_whole
3.  add(product(%x), %t[sample])                     ->  product(%x, sample_bias=%t)             the time embedding
4.  add(product(%x), %rows)                          ->  product(%x, residual=%rows)
5.  group_norm_rows(product(%x), scale, shift, silu) ->  product(%x, scale, shift, silu)
    and where the product itself is read as well     ->  product_and_norm(%x, ...), which stores both
6.  silu(product(%x))                                ->  product(%x, silu)
7.  mul(%a, gelu(%b)) with %a, %b = chunk(linear(%x))->  linear_rows(%x, geglu)

A group norm with the base's statistics works on each pixel alone, so that 5. takes it out of the ResNet altogether: the
first convolution of a ResNet stores what the second reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.layout import Layout
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import Inputs
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import prune, row_count, stands_for

aten = targets.aten

#: Of a product that is read as it is, too.
_WITH_NORM = {
    targets.CONV2D_ROWS: targets.CONV2D_ROWS_AND_NORM,
    targets.LINEAR_ROWS: targets.LINEAR_ROWS_AND_NORM,
}
#: Pointwise operations on rows that may be left, and why.
_LEFT: dict[Any, str] = dict.fromkeys(targets.UNARY | targets.BINARY, "it follows no product that it alone reads")
#: Arguments of a product in front of its epilogue.
_PRODUCT_ARGUMENTS = {targets.CONV2D_ROWS: 5, targets.LINEAR_ROWS: 3}


def fuse_pointwise(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Move pointwise operations on rows into the products before them."""
    report = PassReport("fuse_pointwise")
    graph = graph_module.graph
    inputs = Inputs(graph)
    _silu_into_norms(graph, report)
    for node in [node for node in graph.nodes if node.target in (targets.CONV2D_ROWS, targets.LINEAR)]:
        layout = node.meta.get("rows")
        if layout is None or layout.roles.count("c") != 1:
            continue  # a linear layer of the text or the time embedding, or of each head
        if node.target is targets.LINEAR:
            node.target, node.args = targets.LINEAR_ROWS, (*node.args, None)[:3]
        _fuse(graph, node, row_count(inputs, config, layout), report)
    prune(graph)
    for node in graph.nodes:
        if "rows" in node.meta and node.target in _LEFT:
            report.skip(node, _LEFT[node.target])
    return report


def _silu_into_norms(graph: Graph, report: PassReport) -> None:
    for target in (targets.GROUP_NORM_ROWS, targets.GROUP_NORM_WHOLE):
        for norm in graph.find_nodes(op="call_function", target=target):
            silu = _only_user(norm)
            if silu is not None and silu.target is aten.silu.default:
                norm.args = (*norm.args, True)
                silu.replace_all_uses_with(norm)
                graph.erase_node(silu)
                report.change(silu)


@dataclass
class _Epilogue:
    """The epilogue found so far, and the last operation that it takes in."""

    last: Node
    sample: Node | None = None
    sample_bias: Node | None = None
    residual: Node | None = None
    scale: Node | None = None
    shift: Node | None = None
    activation: str = "none"
    norm: Node | None = None  # of a product that is read before it, too

    def arguments(self, count: Node | None) -> tuple[Node | str | None, ...]:
        parts: tuple[Node | str | None, ...]
        parts = (count, self.sample, self.sample_bias, self.residual, self.scale, self.shift, self.activation)
        while parts and parts[-1] in (None, "none"):
            parts = parts[:-1]
        return parts


def _fuse(graph: Graph, product: Node, count: Node | None, report: PassReport) -> None:
    found = _Epilogue(product)
    taken = []
    while (user := _next(found, product.meta["rows"])) is not None:
        taken.append(user)
    target: Any = product.target
    arguments = (*product.args[: _PRODUCT_ARGUMENTS[target]], *found.arguments(count))
    for user in taken:
        report.change(user)
    if found.norm is None:
        if _geglu(graph, product, found, count, report):
            return
        with graph.inserting_before(found.last):
            fused = graph.call_function(target, arguments)
        stands_for(fused, found.last, product)
    else:
        with graph.inserting_after(found.last):
            fused = graph.call_function(_WITH_NORM[target], arguments)
        fused.meta.update(product.meta)
        with graph.inserting_after(fused):
            raw, normed = (graph.call_function(targets.GETITEM, (fused, i)) for i in (0, 1))
        stands_for(normed, found.norm, product)
        stands_for(raw, found.last, product)


def _next(found: _Epilogue, layout: Layout) -> Node | None:
    """Take in the operation behind ``found.last``, if it fits; returns it."""
    if found.scale is not None or found.activation != "none":
        return None
    user = _only_user(found.last)
    if user is None:
        norms = [each for each in found.last.users if each.target is targets.GROUP_NORM_ROWS]
        if norms:
            found.norm = norms[0]
            _take_norm(found, norms[0])
        return found.norm
    if user.target is aten.add.Tensor and not user.kwargs:
        other = user.args[1] if user.args[0] is found.last else user.args[0]
        if not isinstance(other, Node) or other is found.last or not _take_sum(found, other, layout):
            return None
    elif user.target is targets.GROUP_NORM_ROWS:
        _take_norm(found, user)
    elif user.target is aten.silu.default:
        found.activation = "silu"
    else:
        return None
    found.last = user
    return user


def _take_sum(found: _Epilogue, other: Node, layout: Layout) -> bool:
    if other.target is aten.index_select.default and _is_sample(other.args[2]):
        if found.sample_bias is not None or _is_one_number(other.args[0]):
            return False
        found.sample_bias, found.sample = other.args[0], other.args[2]  # type: ignore[assignment]
        return True
    rows = other.meta.get("rows")
    if found.residual is not None or rows is None or rows.size != layout.size:
        return False
    found.residual = other
    return True


def _is_one_number(value: object) -> bool:
    """Whether a value of each sample, ``reshape(..., [B, channels])``, is one number for all channels."""
    if not isinstance(value, Node) or value.target is not aten.reshape.default:
        return False
    shape = value.args[1]
    return isinstance(shape, list | tuple) and bool(shape[-1] == 1)


def _take_norm(found: _Epilogue, norm: Node) -> None:
    _, found.sample, found.scale, found.shift, *silu = norm.args  # type: ignore[assignment]
    found.activation = "silu" if silu and silu[0] else "none"


def _geglu(graph: Graph, product: Node, found: _Epilogue, count: Node | None, report: PassReport) -> bool:
    """Case 7; False where the product is something else."""
    chunk = _only_user(product)
    if product.target is not targets.LINEAR_ROWS or found.last is not product or chunk is None:
        return False
    if chunk.target is not aten.chunk.default or chunk.args[1:] != (2, 1) or len(chunk.users) != 2:
        return False
    value, gate = sorted(chunk.users, key=lambda piece: int(piece.args[1]))  # type: ignore[arg-type]
    if (value.args[1], gate.args[1]) != (0, 1):
        return False
    gelu, mul = _only_user(gate), _only_user(value)
    if gelu is None or mul is None or gelu.target is not aten.gelu.default:
        return False
    if gelu.kwargs.get("approximate", "none") != "none":
        return False
    if mul.target is not aten.mul.Tensor or set(mul.args) != {value, gelu}:
        return False
    with graph.inserting_before(mul):
        fused = graph.call_function(
            targets.LINEAR_ROWS, (*product.args[:3], count, None, None, None, None, None, "geglu")
        )
    stands_for(fused, mul, product)
    for node in (chunk, gelu, mul):
        report.change(node)
    return True


def _is_sample(node: object) -> bool:
    request = node.meta.get("request") if isinstance(node, Node) else None
    return isinstance(request, PlanTensor) and request.kind == "sample"


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
