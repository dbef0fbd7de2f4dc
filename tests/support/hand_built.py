"""Small graphs of ATen operations, built node by node in fp64, and how to run them at any point between the passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, ControlTensor, requests_of
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.dense.record_activations import record_activations
from fisedit_compile.passes.manager import SPARSE_PASSES
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.region.annotate_layout import annotate_layout
from fisedit_compile.passes.rewriting import is_timestep
from fisedit_compile.planning.edit_plan import plan_edit
from fisedit_compile.testing import assert_close

aten = torch.ops.aten
CONFIG = SparsityConfig(dense_below=1)
MASKED = SparsityConfig(dense_below=1, attention="masked")
BATCH, CHANNELS, SIZE = 2, 4, (6, 5)
HEIGHT, WIDTH = SIZE
PIXELS, HEADS, TOKENS = HEIGHT * WIDTH, 2, 3


class HandBuilt:
    """A graph under construction. Every node carries ``meta["val"]`` (its value) and ``meta["module_path"]``."""

    def __init__(self) -> None:
        self.root, self.graph = torch.nn.Module(), Graph()
        self._random = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._random, dtype=torch.float64)

    def input(self, name: str, *shape: int) -> Node:
        return self._done(self.graph.placeholder(name), self.normal(*shape), "")

    def latents(self) -> Node:
        """The usual input: a map [B, C, H, W]. Inputs come first in a graph, as in an exported one."""
        return self.input("sample", BATCH, CHANNELS, HEIGHT, WIDTH)

    def weight(self, *shape: int) -> Node:
        name = f"weight_{len(self.graph.nodes)}"
        self.root.register_parameter(name, torch.nn.Parameter(self.normal(*shape), requires_grad=False))
        return self._done(self.graph.get_attr(name), getattr(self.root, name), "")

    def op(self, target: Callable[..., Any], *args: Any, path: str = "block", **kwargs: Any) -> Node:
        real_args, real_kwargs = (map_arg(given, lambda node: node.meta["val"]) for given in (args, kwargs))
        return self._done(self.graph.call_function(target, args, kwargs), target(*real_args, **real_kwargs), path)

    def conv(self, x: Node, out: int = CHANNELS, kernel: int = 3, path: str = "block.conv", **geometry: Any) -> Node:
        """A convolution; by default 3x3 with padding 1, so that the size stays."""
        weight = self.weight(out, x.meta["val"].shape[1] // geometry.get("groups", 1), kernel, kernel)
        given = {"stride": [1, 1], "padding": [kernel // 2] * 2, "dilation": [1, 1], "groups": 1} | geometry
        return self.op(aten.conv2d.default, x, weight, self.weight(out), *given.values(), path=path)

    def tokens(self, x: Node) -> Node:
        """[B, C, H, W] -> [B, H*W, C], as diffusers does it."""
        batch, channels, height, width = x.meta["val"].shape
        x = self.op(aten.permute.default, x, [0, 2, 3, 1])
        return self.op(aten.reshape.default, x, [batch, height * width, channels])

    def heads(self, x: Node) -> Node:
        """[B, S, C] -> [B, heads, S, C / heads]."""
        batch, tokens, channels = x.meta["val"].shape
        x = self.op(aten.view.default, x, [batch, tokens, HEADS, channels // HEADS])
        return self.op(aten.transpose.int, x, 1, 2)

    def unheads(self, x: Node) -> Node:
        """[B, heads, S, d] -> [B, C, H, W]."""
        batch, heads, _, width = x.meta["val"].shape
        x = self.op(aten.transpose.int, x, 1, 2)
        x = self.op(aten.reshape.default, x, [batch, HEIGHT, WIDTH, heads * width])
        return self.op(aten.permute.default, x, [0, 3, 1, 2])

    def output(self, value: Node) -> GraphModule:
        """The finished graph, annotated as the dense graph of a U-Net is."""
        self.graph.output(value)
        graph_module = GraphModule(self.root, self.graph)
        annotate_layout(graph_module, CONFIG)
        return graph_module

    def _done(self, node: Node, value: Any, path: str) -> Node:
        node.meta.update(val=value, module_path=path)
        return node


@dataclass
class Snapshots:
    """A dense graph and what it is after each pass."""

    dense: GraphModule
    config: SparsityConfig
    graphs: dict[str, GraphModule] = field(default_factory=dict)
    reports: dict[str, PassReport] = field(default_factory=dict)

    @property
    def final(self) -> GraphModule:
        return self.graphs[SPARSE_PASSES[-1].__name__]

    def before(self, rewrite: Callable[..., PassReport]) -> GraphModule:
        names = list(self.graphs)
        return self.graphs[names[names.index(rewrite.__name__) - 1]]

    def after(self, rewrite: Callable[..., PassReport]) -> GraphModule:
        return self.graphs[rewrite.__name__]

    @cached_property
    def _recorder(self) -> tuple[GraphModule, list[CacheEntry]]:
        asked = [r for graph_module in self.graphs.values() for r in requests_of(graph_module.graph)]
        entries = [request for request in dict.fromkeys(asked) if isinstance(request, CacheEntry)]
        recorder = copy_of(self.dense)
        record_activations(recorder, entries, BATCH)
        return recorder, entries

    def record(self, base: Sequence[torch.Tensor]) -> dict[CacheEntry, torch.Tensor]:
        """All that any of the graphs asks of a base."""
        recorder, entries = self._recorder
        return dict(zip(entries, recorder(*base)[1], strict=True))

    def run(
        self,
        graph_module: GraphModule,
        kept: Mapping[CacheEntry, torch.Tensor],
        edit: Sequence[torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """Run a graph between two passes on the inputs ``edit``, over what a base kept, with the plan of ``mask``."""
        out: torch.Tensor = graph_module(*self.given(graph_module, kept, edit, mask))
        return out

    def given(
        self,
        graph_module: GraphModule,
        kept: Mapping[CacheEntry, torch.Tensor],
        edit: Sequence[torch.Tensor],
        mask: torch.Tensor,
    ) -> list[torch.Tensor]:
        """What :meth:`run` gives to the placeholders of a graph, in their order."""
        requests = requests_of(graph_module.graph)
        plan_requests = [request for request in requests if isinstance(request, PlanTensor)]
        plan = plan_edit(mask, plan_requests, batch=len(edit[0]), dense_below=self.config.dense_below)
        names = [node.target for node in placeholders_of(self.dense)]
        values: dict[Any, torch.Tensor] = {
            **dict(zip(names, edit, strict=True)),
            **without_control(graph_module),
            **kept,
        }
        values.update((request, plan.tensor(request)) for request in plan_requests)
        return [values[node.meta.get("request", node.target)] for node in placeholders_of(graph_module)]

    def run_final(self, base: int, edit: int, mask: torch.Tensor) -> torch.Tensor:
        """The sparse graph on the inputs of seed ``edit``, over the base of seed ``base``."""
        return self.run(self.final, self.record(inputs(self.dense, base)), inputs(self.dense, edit), mask)

    def skips(self, *passes: str) -> list[tuple[str, str]]:
        """(module path, reason) of all that the passes (default: those that decide the region) left as it was."""
        chosen = passes or ("annotate_layout", "select_region")
        return [(skip.module_path, skip.reason) for name in chosen for skip in self.reports[name].skipped]


def without_control(graph_module: GraphModule) -> dict[Any, torch.Tensor]:
    """What the placeholders of control are given where nothing is exchanged: zeros."""
    return {
        node.meta["request"]: torch.zeros(node.meta["val"].shape, dtype=node.meta["val"].dtype)
        for node in placeholders_of(graph_module)
        if isinstance(node.meta.get("request"), ControlTensor)
    }


def copy_of(graph_module: GraphModule) -> GraphModule:
    """The same nodes with the same names and ``meta``, over the same weights."""
    graph = Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return GraphModule(graph_module, graph)


def snapshots(dense: GraphModule, config: SparsityConfig = CONFIG) -> Snapshots:
    """Run all the passes, keeping what each leaves."""
    done = Snapshots(dense, config)
    graph_module = copy_of(dense)
    for rewrite in SPARSE_PASSES:
        done.reports[rewrite.__name__] = rewrite(graph_module, config)
        graph_module.graph.lint()
        done.graphs[rewrite.__name__] = copy_of(graph_module)
    return done


def inputs(graph_module: GraphModule, seed: int) -> list[torch.Tensor]:
    """Values for the placeholders of a dense graph; seed 0 stands for the base, others for edits at its timestep."""
    random = torch.Generator().manual_seed(seed)
    return [
        node.meta["val"] if is_timestep(node) else torch.randn(node.meta["val"].shape, generator=random).double()
        for node in placeholders_of(graph_module)
    ]


def some_mask(density: float = 0.3, samples: int = BATCH, seed: int = 0) -> torch.Tensor:
    """bool [samples, H, W], each its own pixels."""
    return torch.rand(samples, *SIZE, generator=torch.Generator().manual_seed(seed)) < density


def one_pixel() -> torch.Tensor:
    mask = torch.zeros(BATCH, *SIZE, dtype=torch.bool)
    mask[1, 3, 2] = True
    return mask


#: Masks for every rewrite: each sample its own, one pixel of one sample, nothing, everything, one mask for both.
MASKS = {
    "random": some_mask(),
    "one pixel": one_pixel(),
    "none": torch.zeros(BATCH, *SIZE, dtype=torch.bool),
    "all": torch.ones(BATCH, *SIZE, dtype=torch.bool),
    "shared": some_mask(samples=1, seed=1),
}


def assert_every_step_means_the_same(done: Snapshots, *, statistics: bool = False) -> None:
    """Hold the graph after each pass to the dense graph, and each to the others.

    Unchanged inputs give the base whatever the mask. Changed inputs with everything active give the dense graph, and
    with any mask each pass gives what the one before gave, from ``insert_gather_scatter`` on, which fixes the meaning.
    ``statistics``: a group norm takes those of the base, so for changed inputs its pass changes the numbers.
    """
    base, edit = inputs(done.dense, 0), inputs(done.dense, 1)
    kept, base_out = done.record(base), done.dense(*base)
    for mask in MASKS.values():
        meant = done.run(done.graphs["insert_gather_scatter"], kept, edit, mask)
        for name, graph_module in done.graphs.items():
            assert_close(done.run(graph_module, kept, base, mask), base_out)
            if not statistics and name not in ("annotate_layout", "select_region"):
                assert_close(done.run(graph_module, kept, edit, mask), meant)
    if not statistics:
        assert_close(done.run(done.final, kept, edit, MASKS["all"]), done.dense(*edit))


def assert_means_the_same(done: Snapshots, rewrite: Callable[..., PassReport]) -> None:
    """Hold the graph after one pass to the one before it: changed inputs, any mask."""
    kept, edit = done.record(inputs(done.dense, 0)), inputs(done.dense, 1)
    for mask in MASKS.values():
        before, after = (done.run(graph, kept, edit, mask) for graph in (done.before(rewrite), done.after(rewrite)))
        assert_close(after, before)


def arguments(node: Node) -> dict[str, Any]:
    """What an operation is given, by the names of its schema, without what is left at its default.

    An argument that is a node is shown as its request or its target.
    """
    defaults = {each.name: each.default_value for each in node.target._schema.arguments if each.has_default_value()}
    return {
        name: (value.meta.get("request") or value.target) if isinstance(value, Node) else value
        for name, value in arguments_of(node).items()
        if name not in defaults or value != defaults[name]
    }


def placeholders_of(graph_module: GraphModule) -> list[Node]:
    return list(graph_module.graph.find_nodes(op="placeholder"))


def targets_of(graph_module: GraphModule) -> list[Any]:
    """The targets of the operations, in order."""
    return [node.target for node in graph_module.graph.nodes if node.op == "call_function"]


def only(graph_module: GraphModule, target: Any) -> Node:
    """The one operation of that target."""
    (node,) = graph_module.graph.find_nodes(op="call_function", target=target)
    return node
