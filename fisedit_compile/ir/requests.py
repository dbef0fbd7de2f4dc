"""What a rewritten graph needs beside the U-Net's own inputs, as requests that its placeholders carry.

A request names one tensor: of the edit's plan, of the base's cache, of the prompts' alignment, of an earlier stage, or
of the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch.fx import Graph, Node

from fisedit_compile.ir.meta_interpreter import on_meta
from fisedit_compile.ir.plan_tensor import PlanTensor


@dataclass(frozen=True)
class CacheEntry:
    """One tensor that the base keeps of a U-Net call.

    Attributes:
        node: the node of the dense graph that the tensor comes from.
        kind: what is kept of it. ``map`` is its value with one row for each pixel, ``[B*H*W, *channels]``. ``scale``
            and ``shift``, at least fp32 ``[B, C]``, are what a group norm does to each channel of each sample: its
            statistics, weight and bias folded together (paper A.2). ``value`` is its value unchanged, kept where that
            depends on nothing but the timestep. ``attention`` has the maps of a cross-attention for the n conditional
            samples and the first L tokens of the text, ``[n*H*W, heads, L]``. ``tiles`` has what a group norm is given
            over the tiles of each sample, mean and variance of each group, ``[B*TILES, groups, 2]``, see
            ``tile_moments``.
    """

    node: str
    kind: Literal["map", "scale", "shift", "value", "attention", "tiles"]

    @property
    def name(self) -> str:
        return f"base_{self.kind}_{self.node}"


@dataclass(frozen=True)
class ControlTensor:
    """One tensor of Prompt-to-Prompt control, the same for all steps of an edit.

    Attributes:
        kind: ``mapper`` and ``keep`` are the token alignments of the samples' prompts, see
            ``prompt_alignment.align_batch``, and ``weight`` what the map of each token is multiplied by, see
            ``word_weights.token_weights``. ``span`` says of which tokens the base keeps maps, and for which samples,
            see ``controlled_rows``.
    """

    kind: Literal["mapper", "keep", "weight", "span"]

    @property
    def name(self) -> str:
        return f"control_{self.kind}"


@dataclass(frozen=True)
class Hoisted:
    """A value that the stage named ``stage`` computes for later ones: that of ``node`` before the graph was split."""

    stage: str
    node: str

    @property
    def name(self) -> str:
        return f"{self.stage}_{self.node}"


@dataclass(frozen=True)
class Weight:
    """A parameter or buffer of the model, by its path; or a constant that the model makes when it is called."""

    path: str

    @property
    def name(self) -> str:
        return "weight_" + re.sub(r"\W", "_", self.path)


Request = PlanTensor | CacheEntry | ControlTensor | Hoisted | Weight


class Inputs:
    """The placeholders of a graph that passes rewrite. Passes that make the same request share one placeholder."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._known: dict[Request, Node] = {}
        self._last: Node | None = None
        for node in graph.find_nodes(op="placeholder"):
            self._last = node
            if "request" in node.meta:
                self._known[node.meta["request"]] = node

    def __call__(self, request: Request, val: Any = None) -> Node:
        """The placeholder of ``request``, made on first use behind those that are there.

        Args:
            request: what the placeholder asks for.
            val: a tensor of the shape and dtype of what it will be given, for ``meta["val"]``. A tensor of the plan
                needs none: its request says them.
        """
        if request not in self._known:
            if isinstance(request, PlanTensor):
                name = "_".join(("plan", request.kind, *re.findall(r"\d+|dense(?==True)", repr(request.where))))
                val = request.of_full_mask(self.batch)
            else:
                name = request.name
            first = next(iter(self._graph.nodes))
            with self._graph.inserting_after(self._last) if self._last else self._graph.inserting_before(first):
                node = self._graph.placeholder(name)
            node.meta.update(request=request, val=on_meta(val), module_path="")
            self._known[request] = self._last = node
        return self._known[request]

    @property
    def batch(self) -> int:
        """Samples of the U-Net's batch: those of its latents, the first input that lies in space."""
        latents = next(node for node in self._graph.find_nodes(op="placeholder") if "layout" in node.meta)
        return int(latents.meta["val"].shape[0])


def requests_of(graph: Graph) -> list[Request]:
    """The requests that a graph's placeholders carry, in the order of the placeholders."""
    nodes = graph.find_nodes(op="placeholder")
    return [node.meta["request"] for node in nodes if "request" in node.meta]
