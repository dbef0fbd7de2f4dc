"""Pass 14: take out of the step what does not change from step to step.

Each value is computed in the earliest stage that has everything it depends on:

    stage      its values depend on             such as                                 it runs
    constant   weights                          packed convolution weights              once a model
    prompt     the embedded text                keys and values of cross-attention      once an edit
    fetch      the base's cache and the plan    halo rows                               ahead of a step
    step       anything else                                                            every step

The fetch is a stage of its own because it can run wherever the base is kept.

    before:   %k = linear(%text, %w); %y = op(%x, %k)
    after:    stage prompt returns %k;  stage step reads placeholder %prompt_k
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, Hoisted, Inputs
from fisedit_compile.passes import targets
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import is_timestep

aten = targets.aten

#: The stages before the step, in their order.
HOISTED_STAGES = ("constant", "prompt", "fetch")


def hoist_invariants(graph_module: GraphModule, config: SparsityConfig) -> PassReport:
    """Set ``meta["stage"]`` on every operation of a sparse graph."""
    report = PassReport("hoist_invariants")
    sources: dict[Node, frozenset[str]] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            sources[node] = frozenset({_source(node)})
            continue
        sources[node] = frozenset().union(*(sources[arg] for arg in node.all_input_nodes))
        if node.op == "call_function":
            node.meta["stage"] = stage = "fetch" if is_fetch(node) else _stage(sources[node])
            if stage != "step":
                report.change(node)
    return report


def _source(placeholder: Node) -> str:
    """The stage in which an input is known.

    The timestep is left as an input where its embedding depends on the prompt as well.
    """
    if "request" in placeholder.meta or "layout" in placeholder.meta or is_timestep(placeholder):
        return "step"
    return "prompt"


def is_fetch(node: Node) -> bool:
    """Whether an operation does nothing but read halo rows of the base's cache."""
    if node.target is not aten.index_select.default:
        return False
    source, _, index = (arg.meta.get("request") if isinstance(arg, Node) else None for arg in node.args)
    return isinstance(source, CacheEntry) and isinstance(index, PlanTensor) and index.kind == "halo"


def fetched_rows(graph_module: GraphModule) -> dict[Hoisted, tuple[CacheEntry, PlanTensor]]:
    """The source of each value of the stage ``fetch``, (entry, index): the value is ``cache[entry][plan[index]]``."""
    nodes = [node for node in graph_module.graph.nodes if node.op == "call_function" and is_fetch(node)]
    return {Hoisted("fetch", node.name): (node.args[0].meta["request"], node.args[2].meta["request"]) for node in nodes}


def _stage(sources: frozenset[str]) -> str:
    """The stage of a value that depends on inputs of these stages."""
    if not sources:
        return "constant"
    return next(iter(sources)) if len(sources) == 1 else "step"


def split_stages(graph_module: GraphModule) -> dict[str, GraphModule]:
    """One graph for each stage, the step's last.

    A hoisted stage's graph returns the tuple of its values that later stages read; there they are placeholders whose
    ``meta["request"]`` is a :class:`~fisedit_compile.ir.requests.Hoisted`. ``meta["stage"]`` and
    ``meta["values"]`` of its output node name the stage and, in the order of the tuple, those values.
    """
    read_later = {stage: _read_later(graph_module, stage) for stage in HOISTED_STAGES}
    stages = {}
    for position, stage in enumerate((*HOISTED_STAGES, "step")):
        known = {node: earlier for earlier in HOISTED_STAGES[:position] for node in read_later[earlier]}
        values = read_later.get(stage)
        returned = graph_module.graph.output_node().args[0] if values is None else tuple(values)
        needed = _needed(returned, known)
        graph = Graph()
        copies: dict[Node, Node] = {}
        for node in graph_module.graph.nodes:
            if node in needed and node.op == "placeholder":
                copies[node] = graph.node_copy(node)
        inputs = Inputs(graph)
        for node, earlier in known.items():
            if node in needed:
                copies[node] = inputs(Hoisted(earlier, _name(node)), node.meta["val"])
        for node in graph_module.graph.nodes:
            if node in needed and node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        output = graph.output(map_arg(returned, copies.__getitem__))
        if values is not None:
            output.meta.update(stage=stage, values=[_name(node) for node in values])
        stages[stage] = GraphModule(graph_module, graph)
    return stages


def _needed(returned: Any, known: Collection[Node]) -> set[Node]:
    """The nodes that a graph needs to return values, up to those that are known where it runs."""
    needed: set[Node] = set()
    open_nodes: list[Node] = []
    map_arg(returned, open_nodes.append)
    while open_nodes:
        node = open_nodes.pop()
        if node not in needed:
            needed.add(node)
            open_nodes.extend(() if node in known else node.all_input_nodes)
    return needed


def _name(node: Node) -> str:
    """The name of a hoisted value.

    That of a constant is made of how it is computed, so that graphs of one model share what they compute alike.
    """
    if node.meta["stage"] != "constant":
        return node.name
    weights, text = _spelled(node)
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return re.sub(r"\W", "_", f"{weights[0] if weights else 'of_nothing'}_{digest}")


def _spelled(value: object) -> tuple[list[str], str]:
    """The names of the weights that a constant is computed from, and the whole computation as text."""
    if not isinstance(value, Node):
        return [], repr(value)
    if value.op == "get_attr":
        return [str(value.target)], f"%{value.target}"
    weights: list[str] = []

    def spelled(each: Any) -> Any:
        names, text = _spelled(each)
        weights.extend(names)
        return text

    arguments = map_arg((value.args, value.kwargs), spelled)
    return weights, f"{value.target}{arguments}"


def _read_later(graph_module: GraphModule, stage: str) -> list[Node]:
    """The values of ``stage`` that operations of other stages read."""
    return [
        node
        for node in graph_module.graph.nodes
        if node.meta.get("stage") == stage and any(user.meta.get("stage") != stage for user in node.users)
    ]
