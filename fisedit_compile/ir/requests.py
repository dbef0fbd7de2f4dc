"""What a rewritten graph asks of the outside, as placeholders: of the plan, of the base, of an earlier stage."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch.fx import Graph, Node

from fisedit_compile.ir.plan_tensor import PlanTensor


@dataclass(frozen=True)
class CacheEntry:
    """One tensor that the base keeps of a U-Net call.

    ``map``: the value of the captured graph's node ``node``, pixel-major ``[B*H*W, *channels]``.
    ``scale``, ``shift``: what group norm ``node`` does to each channel of each sample, fp32 ``[B, C]``: its
    statistics, weight and bias in one (paper A.2).
    ``value``: a value that depends on the timestep alone, as it is.
    ``attention``: the maps of cross-attention ``node``, ``[n, heads, H*W, tokens]`` of the conditional half.
    """

    node: str
    kind: Literal["map", "scale", "shift", "value", "attention"]

    @property
    def name(self) -> str:
        return f"base_{self.kind}_{self.node}"


@dataclass(frozen=True)
class ControlTensor:
    """One tensor of the token alignments of the samples' prompts, see ``prompt_alignment.align_batch``."""

    kind: Literal["mapper", "keep"]

    @property
    def name(self) -> str:
        return f"control_{self.kind}"


@dataclass(frozen=True)
class Hoisted:
    """A value that an earlier stage computes: node ``node`` of the graph before it was split."""

    stage: str
    node: str

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.node}"


Request = PlanTensor | CacheEntry | ControlTensor | Hoisted


class Inputs:
    """The placeholders of a graph under rewriting: one for each request, whoever asks for it."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[Request, Node] = {}
        self._last: Node | None = None
        for node in graph.find_nodes(op="placeholder"):
            self._last = node
            if "request" in node.meta:
                self._known[node.meta["request"]] = node

    def __call__(self, request: Request) -> Node:
        """The placeholder of ``request``, made on first use behind those that are there."""
        if request not in self._known:
            if isinstance(request, PlanTensor):
                name = "_".join(("plan", request.kind, *re.findall(r"\d+|dense(?==True)", repr(request.where))))
            else:
                name = request.name
            first = next(iter(self._graph.nodes))
            with self._graph.inserting_after(self._last) if self._last else self._graph.inserting_before(first):
                node = self._graph.placeholder(name)
            node.meta["request"] = request
            self._known[request] = self._last = node
        return self._known[request]


def requests_of(graph: Graph) -> list[Request]:
    """What the placeholders of a graph ask of a plan and of a base, in the order of the placeholders."""
    nodes = graph.find_nodes(op="placeholder")
    return [node.meta["request"] for node in nodes if "request" in node.meta]
