"""The graphs of one U-Net for one signature of its inputs, and how they run: record, control, sparse step."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule

from fisedit_compile.capture import Call, Signature, capture
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import BaseMismatchError, MaskError
from fisedit_compile.fingerprint import fingerprint
from fisedit_compile.passes.annotate_layout import annotate_layout
from fisedit_compile.passes.control_cross_attention import control_cross_attention, cross_attentions
from fisedit_compile.passes.hoist_invariants import split_stages
from fisedit_compile.passes.manager import SPARSE_PASSES, run_passes
from fisedit_compile.passes.record_activations import record_activations
from fisedit_compile.passes.report import PassReport
from fisedit_compile.passes.requests import CacheEntry, ControlTensor, Hoisted, requests_of
from fisedit_compile.plan import EditPlan, PlanTensor, plan_edit

#: What the base keeps of one U-Net call.
StepCache = Mapping[CacheEntry, Tensor]

#: Dynamo compiles sizes of 0 and 1 apart from all others.
_FEWEST = 2


class Recorded(dict[CacheEntry, Tensor]):
    """The cache of one recorded call, and the signature of that call."""

    def __init__(self, signature: Signature, kept: Iterable[tuple[CacheEntry, Tensor]]) -> None:
        super().__init__(kept)
        self.signature = signature


@dataclass
class Prepared:
    """What the steps of one edit share: the plan's tensors, and the values that depend on the prompt alone."""

    program: Program
    plan: EditPlan
    values: dict[Any, Tensor]
    prompt: dict[Any, Tensor] = field(default_factory=dict)
    prompt_inputs: tuple[Tensor, ...] = ()
    prompt_versions: tuple[int, ...] = ()


class Program:
    """Record, control and sparse graphs of a U-Net for one signature.

    Args:
        unet: the dense U-Net; its parameters are read where they are.
        call: a call of it; its signature is the one the program is valid for.
        config: what to make sparse and how.

    Raises:
        CaptureError: the U-Net is no single graph.
        SparsifyError: no operation of it can be made sparse.
    """

    def __init__(self, unet: torch.nn.Module, call: Call, config: SparsityConfig) -> None:
        start = time.perf_counter()
        self.signature: Signature = call.signature
        self.config = config
        self.dense: GraphModule = capture(unet, call)
        annotate_layout(self.dense, config)
        self.inputs: list[str] = [str(node.target) for node in self.dense.graph.find_nodes(op="placeholder")]
        self.sparse: GraphModule = _copy(self.dense)
        self.reports: list[PassReport] = run_passes(self.sparse, config, SPARSE_PASSES)
        self._stages = {
            # The fetch is a list of gathers, with nothing to fuse and sizes that each mask has its own of.
            stage: Stage(graph, compiled=config.compile and stage != "fetch")
            for stage, graph in split_stages(self.sparse).items()
        }
        self._constants: dict[Any, Tensor] = {}
        self._constants_of = ""
        self._dense_graphs: dict[object, Stage] = {}
        self.build_seconds = time.perf_counter() - start

    @cached_property
    def plan_requests(self) -> list[PlanTensor]:
        """The index tensors that the sparse graph takes."""
        return [request for request in requests_of(self.sparse.graph) if isinstance(request, PlanTensor)]

    @cached_property
    def cache_entries(self) -> list[CacheEntry]:
        """What the base has to keep of a call for a sparse step."""
        return [request for request in requests_of(self.sparse.graph) if isinstance(request, CacheEntry)]

    @cached_property
    def attention_entries(self) -> list[CacheEntry]:
        """The cross-attention maps that the base has to keep of a call for a controlled dense step."""
        return [CacheEntry(node.name, "attention") for node in cross_attentions(self.dense)]

    def record(self, call: Call, *, samples: int, activations: bool, attention: bool) -> tuple[Tensor, StepCache]:
        """The dense U-Net's output, and what a base keeps of the call.

        Args:
            samples: pictures in the batch; the last ``samples`` of the U-Net's batch are the conditional half.
            activations: keep what sparse steps read.
            attention: keep the cross-attention maps.
        """
        entries = (self.cache_entries if activations else []) + (self.attention_entries if attention else [])

        def build() -> GraphModule:
            graph_module = _copy(self.dense)
            record_activations(graph_module, entries, samples)
            return graph_module

        graph = self._dense_graph(("record", samples, activations, attention), build)
        out, kept = graph(self._user_values(call))
        return out, Recorded(self.signature, zip(entries, kept, strict=True))

    def controlled(self, call: Call, cache: StepCache, mapper: Tensor, keep: Tensor) -> Tensor:
        """The dense U-Net's output with the base's cross-attention maps of unchanged words.

        ``mapper`` and ``keep`` are those of :func:`~fisedit_compile.prompt_to_prompt.align_batch`.
        """

        def build() -> GraphModule:
            graph_module = _copy(self.dense)
            control_cross_attention(graph_module, self.config)
            graph_module.recompile()
            return graph_module

        control: dict[Any, Tensor] = {ControlTensor("mapper"): mapper, ControlTensor("keep"): keep}
        return self._dense_graph("control", build)({**self._user_values(call), **cache, **control})

    def prepare(self, mask: Tensor) -> Prepared:
        """Plan an edit and bring what does not change from step to step into place.

        Args:
            mask: what to recompute, bool ``[n, h, w]`` at latent resolution; n divides the U-Net's batch.

        Raises:
            MaskError: not bool, not ``[n, h, w]``, another resolution than the latents, or n does not divide the batch.
        """
        if not isinstance(mask, Tensor):
            raise MaskError(f"the mask is a {type(mask).__name__}; give a bool tensor [n, h, w] at latent resolution")
        batch, _, *size = self.signature.sample_shape
        if mask.ndim == 3 and list(mask.shape[1:]) != size:
            raise MaskError(f"a mask of {tuple(mask.shape[1:])} for latents of {tuple(size)}: resize it first")
        # Planned on the CPU: some hundred small operations, and the row counts have to be known to the host anyway.
        plan = plan_edit(mask.cpu(), self.plan_requests, batch=batch, blocks=self.config.blocks)
        plan = plan.to(next(iter(self.dense.parameters())).device)
        self._refresh_constants()
        values: dict[Any, Tensor] = {request: plan.tensor(request) for request in self.plan_requests}
        for request, halo in values.items():
            if request.kind == "halo" and len(halo) < _FEWEST:  # rows that no table refers to
                values[request] = torch.nn.functional.pad(halo, (0, _FEWEST - len(halo)))
        return Prepared(self, plan, values)

    def step(self, call: Call, cache: StepCache, prepared: Prepared) -> Tensor:
        """One sparse step: the base's output with the active pixels computed anew, ``[B, C, H, W]``."""
        values: dict[Any, Tensor] = {**self._user_values(call), **self._constants}
        self._refresh_prompt(prepared, values)
        values.update(prepared.prompt)
        values.update(prepared.values)
        values.update(cache)
        few = min(prepared.plan.counts.values()) < _FEWEST
        values.update(self._stages["fetch"].values(values))
        return self._stages["step"](values, eagerly=few)

    def stage(self, name: str) -> Stage:
        """One of the stages ``constant``, ``prompt``, ``fetch`` and ``step`` of the sparse graph."""
        return self._stages[name]

    def _refresh_prompt(self, prepared: Prepared, values: dict[Any, Tensor]) -> None:
        """Run the prompt's stage when its inputs are other tensors than last time, or were written to since."""
        stage = self._stages["prompt"]
        inputs = tuple(values[name] for name in stage.names if name in self.inputs)
        versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in inputs)
        same = len(inputs) == len(prepared.prompt_inputs) and all(map(operator.is_, inputs, prepared.prompt_inputs))
        if not same or versions != prepared.prompt_versions or not prepared.prompt:
            prepared.prompt = stage.values(values)
            prepared.prompt_inputs, prepared.prompt_versions = inputs, versions

    def _refresh_constants(self) -> None:
        """Fold what depends on the weights alone; again when a weight was written to.

        By values, not by version counters: a LoRA is fused by ``weight.data += ...``, which leaves those as they are.
        """
        weights = fingerprint(self.dense)
        if weights != self._constants_of:
            self._constants = self._stages["constant"].values({})
            self._constants_of = weights

    def check_cache(self, cache: StepCache) -> None:
        """Hold the cache of a call to what the sparse graph reads.

        Raises:
            BaseMismatchError: an entry is missing, or is of another shape or dtype.
        """
        if missing := [entry for entry in self.cache_entries if entry not in cache]:
            raise BaseMismatchError(
                f"the cache holds nothing for {missing[0].node} and {len(missing) - 1} more: record the call with "
                "this U-Net and this config first"
            )
        recorded = getattr(cache, "signature", self.signature).sample_shape
        if recorded != self.signature.sample_shape:
            wanted = self.signature.sample_shape
            raise BaseMismatchError(f"the cache is of a call with latents {recorded}, not {wanted}: record this one")
        for entry, (shape, dtype) in self._cache_shapes.items():
            kept = cache[entry]
            if kept.shape != shape or (entry.kind == "map" and kept.dtype is not dtype):
                raise BaseMismatchError(
                    f"the cache holds {entry.node} as {tuple(kept.shape)} {kept.dtype}, this call reads {tuple(shape)} "
                    f"{dtype}: record the base with inputs of this batch, size and dtype"
                )

    @cached_property
    def _cache_shapes(self) -> dict[CacheEntry, tuple[torch.Size, torch.dtype]]:
        nodes = {node.name: node for node in self.dense.graph.nodes}
        shapes = {}
        for entry in self.cache_entries:
            val, layout = nodes[entry.node].meta["val"], nodes[entry.node].meta["layout"]
            if entry.kind == "map":
                kept = val.permute(layout.order).flatten(0, layout.pixel_dims - 1).shape
            else:
                kept = torch.Size((val.shape[0], nodes[entry.node].args[1]))
            shapes[entry] = (kept, val.dtype)
        return shapes

    def _user_values(self, call: Call) -> dict[Any, Tensor]:
        return dict(zip(self.inputs, call.tensors, strict=True))

    def _dense_graph(self, key: object, build: Callable[[], GraphModule]) -> Stage:
        if key not in self._dense_graphs:
            self._dense_graphs[key] = Stage(build(), compiled=self.config.compile)
        return self._dense_graphs[key]


class Stage:
    """A graph that takes its placeholders by name or request, from a dict of values."""

    def __init__(self, graph_module: GraphModule, *, compiled: bool) -> None:
        graph = graph_module.graph
        self.graph_module = graph_module
        self.names: list[Any] = [n.meta.get("request", n.target) for n in graph.find_nodes(op="placeholder")]
        stage = graph.output_node().meta.get("stage")
        self.outputs = [Hoisted(stage, name) for name in graph.output_node().meta.get("values", ())] if stage else []
        self._run: Callable[..., Any] = torch.compile(graph_module) if compiled else graph_module

    def __call__(self, values: Mapping[Any, Tensor], *, eagerly: bool = False) -> Any:
        """Run the graph; ``eagerly`` where its compiled form would be compiled again for one mask alone."""
        run = self.graph_module if eagerly else self._run
        with torch.no_grad():
            return run(*(values[name] for name in self.names))

    def values(self, values: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
        """The outputs of a hoisted stage, by the requests of the stages that read them."""
        return dict(zip(self.outputs, self(values), strict=True)) if self.outputs else {}


def _copy(graph_module: GraphModule) -> GraphModule:
    """A copy that shares parameters and node names, for the next rewriting."""
    graph = Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return GraphModule(graph_module, graph)
