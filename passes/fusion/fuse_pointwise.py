"""Pass 11: what follows a product of rows pixel by pixel moves into its epilogue, before the result is stored.

1.  A linear layer of rows becomes ``linear_rows``, which can take an epilogue as ``conv2d_rows`` can.
2.  silu(group_norm_rows(%x, ...))                   ->  group_norm_rows(%x, ..., silu)          and group_norm_whole
3.  add(product(%x), %t[sample])                     ->  product(%x, sample_bias=%t)             the time embedding
4.  add(product(%x), %rows)                          ->  product(%x, residual=%rows)
5.  group_norm_rows(product(%x), scale, shift, silu) ->  product(%x, scale, shift, silu)
    and where the product itself is read as well     ->  product_and_norm(%x, ...), which stores both
6.  silu(product(%x))                                ->  product(%x, silu)
7.  mul(%a, gelu(%b)) with %a, %b = chunk(linear(%x))->  linear_rows(%x, geglu)

A group norm with the base's statistics works on each pixel alone. Case 5 therefore takes it out of the ResNet
altogether: the ResNet's first convolution stores what its second one reads.
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
from fisedit_compile.passes.arguments import arguments_of, call_form
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import has_the_base_s_statistics, make_call, only_user, prune, row_count
from fisedit_compile.passes.row_product import RowProduct

aten = targets.aten

#: Pointwise operations on rows that this pass may leave as they are, with the reason that it reports.
_LEFT: dict[Any, str] = dict.fromkeys(targets.UNARY | targets.BINARY, "it follows no product that it alone reads")


def fuse_pointwise(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Move pointwise operations on rows into the products before them."""
    report = PassReport("fuse_pointwise")
    graph = graph_module.graph
    inputs = Inputs(graph)
    _silu_into_norms(graph, report)
    for node in [node for node in graph.nodes if node.target in (targets.CONV2D_ROWS, targets.LINEAR)]:
        layout = node.meta.get("row_layout")
        if layout is None or layout.roles.count("c") != 1:
            continue  # a linear layer of the text or the time embedding, or of each head
        if node.target is targets.LINEAR:
            given = arguments_of(node)
            node.target, node.args = targets.LINEAR_ROWS, (given["input"], given["weight"], given["bias"])
        _fuse(graph, RowProduct(node), row_count(inputs, config, layout), report)
    prune(graph)
    for node in graph.nodes:
        if "row_layout" in node.meta and node.target in _LEFT:
            report.skip(node, _LEFT[node.target])
    return report


def _silu_into_norms(graph: Graph, report: PassReport) -> None:
    """Case 2."""
    for target in (targets.GROUP_NORM_ROWS, targets.GROUP_NORM_WHOLE):
        for norm in graph.find_nodes(op="call_function", target=target):
            silu = only_user(norm)
            if silu is not None and silu.target is aten.silu.default:
                norm.args, norm.kwargs = call_form(target, {**arguments_of(norm), "silu": True})
                silu.replace_all_uses_with(norm)
                graph.erase_node(silu)
                report.change(silu)


@dataclass
class _Epilogue:
    """The epilogue that was found behind one product so far.

    Attributes:
        last: the last operation that it takes in; at first the product itself.
        norm: the group norm that it takes in although ``last``, which the norm reads, is read elsewhere as well.
    """

    last: Node
    sample: Node | None = None
    sample_bias: Node | None = None
    residual: Node | None = None
    scale: Node | None = None
    shift: Node | None = None
    activation: str = "none"
    norm: Node | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """As a product of rows takes them."""
        names = ("sample", "sample_bias", "residual", "scale", "shift", "activation")
        return {name: getattr(self, name) for name in names}


def _fuse(graph: Graph, product: RowProduct, count: Node | None, report: PassReport) -> None:
    found = _Epilogue(product.node)
    taken = []
    while (user := _next(found, product.node.meta["row_layout"])) is not None:
        taken.append(user)
    for user in taken:
        report.change(user)
    if found.norm is not None:
        _replace_both(graph, product, found, count)
    elif not _geglu(graph, product, found, count, report):
        with graph.inserting_before(found.last):
            found.last.replace_all_uses_with(_with(graph, product, count=count, **found.arguments))


def _replace_both(graph: Graph, product: RowProduct, found: _Epilogue, count: Node | None) -> None:
    """Case 5 where the product is read before its norm, too."""
    assert found.norm is not None
    target = targets.WITH_NORM[product.node.target]  # type: ignore[index]
    with graph.inserting_after(found.last):
        both = _with(graph, product, target, count=count, **found.arguments)
    place = {key: both.meta[key] for key in ("module_path", "row_layout")}
    with graph.inserting_after(both):
        raw = make_call(graph, targets.GETITEM, (both, 0), **place)
    with graph.inserting_after(raw):
        normed = make_call(graph, targets.GETITEM, (both, 1), **place)
    found.norm.replace_all_uses_with(normed)
    found.last.replace_all_uses_with(raw)


def _with(graph: Graph, product: RowProduct, target: Any = None, **epilogue: Any) -> Node:
    """A product of the same operands with an epilogue; ``target``: another operator that takes them."""
    target = target or product.node.target
    place = {key: product.node.meta[key] for key in ("module_path", "row_layout")}
    return make_call(graph, target, *call_form(target, {**product.arguments, **epilogue}), **place)


def _next(found: _Epilogue, layout: Layout) -> Node | None:
    """Take in the operation behind ``found.last``, if an epilogue can do it, and return it."""
    if found.scale is not None or found.activation != "none":
        return None
    user = only_user(found.last)
    if user is None:
        norms = [each for each in found.last.users if has_the_base_s_statistics(each)]
        if norms:
            found.norm = norms[0]
            _take_norm(found, norms[0])
        return found.norm
    if user.target is aten.add.Tensor and not user.kwargs:
        other = user.args[1] if user.args[0] is found.last else user.args[0]
        if not isinstance(other, Node) or other is found.last or not _take_sum(found, other, layout):
            return None
    elif has_the_base_s_statistics(user):
        _take_norm(found, user)
    elif user.target is aten.silu.default:
        found.activation = "silu"
    else:
        return None
    found.last = user
    return user


def _take_sum(found: _Epilogue, other: Node, layout: Layout) -> bool:
    """Cases 3 and 4: take in the other operand of a sum, if an epilogue has a place for it that is still free."""
    if other.target is aten.index_select.default and _is_sample(other.args[2]):
        values = other.args[0]  # [B, channels]; [B, 1] where a sample has one number for all channels
        if found.sample_bias is not None or values.meta["val"].shape[1] != found.last.meta["val"].shape[1]:  # type: ignore[union-attr]
            return False
        found.sample_bias, found.sample = values, other.args[2]  # type: ignore[assignment]
        return True
    place = other.meta.get("row_layout")
    if found.residual is not None or place is None or place.size != layout.size:
        return False
    found.residual = other
    return True


def _take_norm(found: _Epilogue, norm: Node) -> None:
    given = arguments_of(norm)
    found.sample, found.scale, found.shift = given["sample"], given["scale"], given["shift"]
    found.activation = "silu" if given["silu"] else "none"


def _geglu(graph: Graph, product: RowProduct, found: _Epilogue, count: Node | None, report: PassReport) -> bool:
    """Case 7; False where what follows the product is something else."""
    chunk = only_user(product.node)
    if product.node.target is not targets.LINEAR_ROWS or found.last is not product.node or chunk is None:
        return False
    if chunk.target is not aten.chunk.default or chunk.args[1:] != (2, 1) or len(chunk.users) != 2:
        return False
    value, gate = sorted(chunk.users, key=lambda piece: int(piece.args[1]))  # type: ignore[arg-type]
    if (value.args[1], gate.args[1]) != (0, 1):
        return False
    gelu, mul = only_user(gate), only_user(value)
    if gelu is None or mul is None or gelu.target is not aten.gelu.default:
        return False
    if gelu.kwargs.get("approximate", "none") != "none":
        return False
    if mul.target is not aten.mul.Tensor or set(mul.args) != {value, gelu}:
        return False
    with graph.inserting_before(mul):
        mul.replace_all_uses_with(_with(graph, product, count=count, activation="geglu"))
    for node in (chunk, gelu, mul):
        report.change(node)
    return True


def _is_sample(node: object) -> bool:
    request = node.meta.get("request") if isinstance(node, Node) else None
    return isinstance(request, PlanTensor) and request.kind == "sample"
