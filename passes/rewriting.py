"""What the passes share: moving a gather in front of its operation, replacing, naming and removing operations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.layout import Layout
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import Inputs
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.region.insert_gather_scatter import gather


class RowBuilder:
    """Builds the row form of one operation, in front of the gather that it replaces."""

    def __init__(self, graph: Graph, inputs: Inputs, module_path: str) -> None:
        self.graph = graph
        self.inputs = inputs
        self._module_path = module_path

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """One operation on rows, or on what goes with them."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta["module_path"] = self._module_path
        return node

    def rows(self, value: Node) -> Node:
        """The active pixels of a spatial value; a scatter behind it cancels later."""
        return gather(self.graph, value, self.inputs(PlanTensor("index", value.meta["layout"].size)))

    def pixels(self, value: Node) -> Node:
        """A dense value pixel-major, ``[B*H*W, *channels]``; a view where channels already lie last."""
        layout = value.meta["layout"]
        permuted = self.call(targets.aten.permute.default, value, list(layout.order))
        return self.call(targets.aten.flatten.using_ints, permuted, 0, layout.pixel_dims - 1)


def move_gathers(
    graph_module: GraphModule,
    report: PassReport,
    operations: Collection[object],
    build: Callable[[RowBuilder, Node], Node],
) -> None:
    """Replace ``gather_rows(op(...))`` by ``build(builder, op)`` for every ``op`` of ``operations`` in the region."""
    graph = graph_module.graph
    inputs = Inputs(graph)
    for node in graph.find_nodes(op="call_function", target=targets.GATHER_ROWS):
        op = node.args[0]
        if op.target not in operations or not op.meta.get("region"):
            continue
        with graph.inserting_before(node):
            new = build(RowBuilder(graph, inputs, op.meta["module_path"]), op)
        new.meta["rows"] = op.meta["layout"]
        node.replace_all_uses_with(new)
        graph.erase_node(node)
        report.change(op)


def prune(graph: Graph) -> None:
    """Drop what nobody reads: operations, and placeholders that a pass made."""
    # Attention counts as impure for its dropout, which capture has ruled out: only inputs and the output must stay.
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    for node in graph.find_nodes(op="placeholder"):
        if not node.users:
            graph.erase_node(node)


def row_count(inputs: Inputs, config: SparsityConfig, layout: Layout) -> Node | None:
    """How many rows of a layout's resolution are real, which kernels read; None where all pixels are rows."""
    return None if config.is_whole(layout.size) else inputs(PlanTensor("count", layout.size))


def common_path(paths: Sequence[str]) -> str:
    """The innermost module that holds all of these: that of an operation made of theirs."""
    shared = []
    for parts in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def stands_for(new: Node, old: Node, product: Node) -> None:
    """Let rows made of a product take the place of an operation that followed it."""
    new.meta.update(rows=product.meta["rows"], module_path=product.meta["module_path"])
    old.replace_all_uses_with(new)
