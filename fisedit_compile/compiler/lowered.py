"""What the compiler makes of a U-Net for one signature of its inputs: the graphs, and what they say without running.

A :class:`Lowered` holds no weights and nothing on a device: all U-Nets of the same form share one, and a U-Net on the
meta device does as well as any other. :class:`~fisedit_compile.runtime.program.Program` runs one with the weights of a
U-Net; ``explain``, MAC counting and the cost model read one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from fisedit_compile.compiler.kept_of_calls import KeptOfCalls, TensorSpec
from fisedit_compile.compiler.stage_graph import StageGraph
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import MaskError
from fisedit_compile.ir.call import Signature
from fisedit_compile.ir.layout import Layout, Size
from fisedit_compile.ir.meta_interpreter import on_meta
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, ControlTensor, Hoisted, Weight, requests_of
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of
from fisedit_compile.passes.dense.control_cross_attention import control_cross_attention
from fisedit_compile.passes.dense.pack_recorded import pack_recorded
from fisedit_compile.passes.dense.record_activations import record_activations
from fisedit_compile.passes.manager import FOLLOWING_PASSES, SPARSE_PASSES, Pass, run_passes
from fisedit_compile.passes.pass_report import PassReport
from fisedit_compile.passes.rewriting import is_timestep
from fisedit_compile.passes.staging.hoist_invariants import fetched_rows, split_stages
from fisedit_compile.planning.apsc import CostModel
from fisedit_compile.planning.buckets import Buckets
from fisedit_compile.planning.edit_plan import EditPlan, plan_edit
from fisedit_compile.utils.collecting_paused import collecting_paused
from fisedit_compile.utils.single_thread import single_thread


def lower_graph(
    signature: Signature,
    config: SparsityConfig,
    dense: GraphModule,
    passes: tuple[Pass, ...],
    constants: Mapping[str, Tensor],
    start: float,
) -> Lowered:
    """Rewrite a copy of a dense graph into a sparse one and cut that into stages; the arguments are of the result."""
    with collecting_paused():
        sparse = copy_graph(dense)
        reports = run_passes(sparse, config, passes)
        stages = {name: StageGraph(graph) for name, graph in split_stages(sparse).items()}
    follows = passes is SPARSE_PASSES
    seconds = time.perf_counter() - start
    return Lowered(signature, config, dense, sparse, reports, stages, constants, seconds, follows)


@dataclass(frozen=True, eq=False)
class Lowered:
    """The graphs of a U-Net for one signature. Made by :func:`~fisedit_compile.compiler.lower.lower`.

    In ``dense`` and ``sparse`` weights are attributes on the meta device; a :class:`StageGraph` takes them as inputs.

    Attributes:
        signature: says which calls the graphs serve.
        config: what was made sparse and how.
        dense: the dense graph with layouts annotated; :meth:`recording` and :meth:`controlled` make theirs from it.
        sparse: the sparse graph before it was cut into stages.
        reports: what each pass did, in the order of the passes.
        stages: the sparse graph cut into the stages ``constant`` (run once for each model), ``prompt`` (once for each
            edit), ``fetch`` and ``step`` (at each denoising step), by name.
        constants: the values of those weights that are no parameters or buffers of the U-Net, by path: tensors that it
            makes when it is called, or that a processor holds.
        build_seconds: how long exporting and rewriting took.
        follows: whether a base also keeps what :attr:`following` reads.
    """

    signature: Signature
    config: SparsityConfig
    dense: GraphModule
    sparse: GraphModule
    reports: list[PassReport]
    stages: dict[str, StageGraph]
    constants: Mapping[str, Tensor]
    build_seconds: float
    follows: bool = False

    @cached_property
    def following(self) -> Lowered | None:
        """The graphs for masks that change much of the picture, whose norms follow the edit; None without norms."""
        if not self.kept.tiles:
            return None
        start = time.perf_counter()
        return lower_graph(self.signature, self.config, self.dense, FOLLOWING_PASSES, self.constants, start)

    def weights_of(self, unet: torch.nn.Module) -> dict[Weight, Tensor]:
        """What the graphs read of a U-Net, where it lies; it has the form of the one that they were made of."""
        tensors = {**tensors_of(unet), **self.constants}
        return {Weight(path): tensors[path] for path in weights_in(self.dense.graph)}

    @property
    def batch(self) -> int:
        """Samples in the U-Net's batch: two for each picture under classifier-free guidance."""
        return self.signature.sample_shape[0]

    @property
    def latents(self) -> Size:
        """Height and width of the latents, in cells."""
        height, width = self.signature.sample_shape[2:]
        return height, width

    @cached_property
    def inputs(self) -> list[str]:
        """The names of the dense graph's inputs, in the order of ``call.tensors``."""
        return [str(node.target) for node in self.dense.graph.find_nodes(op="placeholder")]

    @cached_property
    def timesteps(self) -> list[int]:
        """The positions of the timesteps among :attr:`inputs`."""
        return [i for i, node in enumerate(self.dense.graph.find_nodes(op="placeholder")) if is_timestep(node)]

    @cached_property
    def plan_requests(self) -> list[PlanTensor]:
        """The index tensors that the sparse graph takes from an edit's plan."""
        return [request for request in requests_of(self.sparse.graph) if isinstance(request, PlanTensor)]

    @cached_property
    def control_specs(self) -> dict[ControlTensor, TensorSpec]:
        """The shape and dtype of each tensor of control that a sparse step reads."""
        nodes = self.sparse.graph.find_nodes(op="placeholder")
        specs = {node.meta.get("request"): node.meta["val"] for node in nodes}
        return {key: (val.shape, val.dtype) for key, val in specs.items() if isinstance(key, ControlTensor)}

    @cached_property
    def fetches(self) -> dict[Hoisted, tuple[CacheEntry, PlanTensor]]:
        """For each value that the stage ``fetch`` returns: the cache entry and the plan's index that give its rows."""
        return fetched_rows(self.sparse)

    @cached_property
    def output(self) -> tuple[CacheEntry, Layout] | None:
        """The base's noise prediction, into which a step scatters its rows, and the layout of the result.

        None if the U-Net ends in an operation that cannot run on rows and so computes all pixels.
        """
        scatter = self.sparse.graph.output_node().args[0]
        if not isinstance(scatter, Node) or scatter.target is not targets.SCATTER_ROWS:
            return None
        return arguments_of(scatter)["base"].meta["request"], scatter.meta["layout"]

    @cached_property
    def kept(self) -> KeptOfCalls:
        """What a base keeps of each call."""
        return KeptOfCalls(
            self.config,
            self.dense,
            self.sparse,
            self.batch,
            None if self.output is None else self.output[0],
            self.follows,
        )

    @cached_property
    def buckets(self) -> Buckets:
        """The sizes that plans are padded to where a step has to run at fixed sizes."""
        return Buckets(self.plan_requests, batch=self.batch, latents=self.latents, dense_below=self.config.dense_below)

    @cached_property
    def step_specs(self) -> dict[Any, Tensor]:
        """A tensor on the meta device for every input and weight, entry of the base's cache and tensor of control.

        The plan's tensors are not among them, because their sizes depend on the mask.
        """
        inputs = self.dense.graph.find_nodes(op="placeholder")
        specs: dict[Any, Tensor] = {str(node.target): on_meta(node.meta["val"]) for node in inputs}
        for node in self.dense.graph.find_nodes(op="get_attr"):
            specs[Weight(str(node.target))] = on_meta(node.meta["val"])
        for node in self.sparse.graph.find_nodes(op="placeholder"):
            if isinstance(node.meta.get("request"), CacheEntry | ControlTensor):
                specs[node.meta["request"]] = node.meta["val"]
        for entry, (shape, dtype) in self.kept.tiles.items():
            specs[entry] = torch.empty(shape, dtype=dtype, device="meta")
        return specs

    def plan(self, mask: Tensor, *, costs: CostModel | None = None) -> EditPlan:
        """The plan of a mask, made on the mask's device.

        Args:
            mask: what to recompute, bool ``[n, h, w]`` at latent resolution; n divides the U-Net's batch.
            costs: predicts microseconds, see :func:`~fisedit_compile.planning.edit_plan.plan_edit`; needed with
                ``blocks="measured"``.

        Raises:
            MaskError: the mask is not bool ``[n, h, w]``, has another resolution than the latents, or n does not divide
                the batch.
        """
        if not isinstance(mask, Tensor):
            raise MaskError(f"the mask is a {type(mask).__name__}; give a bool tensor [n, h, w] at latent resolution")
        if mask.ndim == 3 and tuple(mask.shape[1:]) != self.latents:
            raise MaskError(f"a mask of {tuple(mask.shape[1:])} for latents of {self.latents}: resize it first")
        with single_thread():  # of the CPU: a plan is some hundred small operations
            return plan_edit(
                mask,
                self.plan_requests,
                batch=self.batch,
                blocks=self.config.blocks,
                dense_below=self.config.dense_below,
                costs=costs,
            )

    def recording(
        self, entries: Sequence[CacheEntry], samples: int, part: int, tokens: int | None = None
    ) -> StageGraph:
        """The dense graph that also returns each entry as a base keeps it.

        The batch consists of parts of ``samples`` each, of which the one at place ``part`` is conditional. Attention
        maps are of the first ``tokens`` of the text; None is all.
        """
        key = (tuple(entries), samples, part, tokens)
        if key not in self._recordings:
            self._recordings[key] = self._recording(*key)
        return self._recordings[key]

    @cached_property
    def _recordings(self) -> dict[object, StageGraph]:
        return {}

    def _recording(self, entries: Sequence[CacheEntry], samples: int, part: int, tokens: int | None) -> StageGraph:
        graph_module = copy_graph(self.dense)
        record_activations(graph_module, entries, samples, part, tokens)
        pack_recorded(graph_module, entries, self.kept.formats)
        return StageGraph(graph_module)

    def controlled(self, part: int) -> StageGraph:
        """The dense graph in which one part of the batch takes the base's cross-attention maps of unchanged words."""
        graph_module = copy_graph(self.dense)
        control_cross_attention(graph_module, self.config, part)
        graph_module.recompile()
        return StageGraph(graph_module)


def tensors_of(unet: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a U-Net, by each path that they have."""
    tensors: dict[str, Tensor] = dict(unet.named_parameters(remove_duplicate=False))
    return tensors | dict(unet.named_buffers(remove_duplicate=False))


def weights_in(graph: Graph) -> list[str]:
    """The paths of the weights that a graph reads as attributes, each once."""
    return list(dict.fromkeys(str(node.target) for node in graph.find_nodes(op="get_attr")))


def copy_graph(graph_module: GraphModule) -> GraphModule:
    """A copy to rewrite, with the same node names and the very same parameters; its code is written when it runs."""
    graph = Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    return _LazyGraphModule(graph_module, graph)
