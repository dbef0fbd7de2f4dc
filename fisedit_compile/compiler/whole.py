"""The dense U-Net by operations on rows: the graphs in which every pixel of every resolution is a row.

On a GPU such a graph takes less time than the dense one under torch.compile, and needs no compilation of its own: its
kernels and its constants are those of the sparse step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fisedit_compile.compiler.lowered import Lowered, copy_graph
from fisedit_compile.compiler.stage_graph import StageGraph
from fisedit_compile.config import EVERY_RESOLUTION
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.passes.dense.pack_recorded import pack_recorded
from fisedit_compile.passes.dense.record_rows import keep_values, record_rows
from fisedit_compile.passes.manager import WHOLE_PASSES, run_passes
from fisedit_compile.passes.region.cancel_scatter_gather import cancel_scatter_gather
from fisedit_compile.passes.staging.hoist_invariants import split_stages
from fisedit_compile.planning.edit_plan import plan_edit
from fisedit_compile.utils.single_thread import single_thread


@dataclass(frozen=True, eq=False)
class WholeGraphs:
    """The stages of one graph, by name; without ``fetch``, as nothing of a base's maps is read.

    Attributes:
        stages: ``constant``, ``prompt`` and ``step``; the step returns the noise prediction, and where it records also
            a tuple of what the base keeps.
        plan: the index tensors that the step reads, on the CPU; always the same.
        controlled: the base's attention maps that the step reads, under control.
    """

    stages: dict[str, StageGraph]
    plan: dict[PlanTensor, Tensor]
    controlled: list[CacheEntry]


def lower_whole(
    lowered: Lowered,
    entries: Sequence[CacheEntry] | None = None,
    *,
    samples: int = 1,
    part: int = -1,
    control: bool = False,
) -> WholeGraphs:
    """Rewrite the dense graph of ``lowered`` so that every pixel is a row.

    Args:
        lowered: of the U-Net.
        entries: what the graph also returns; None: nothing.
        samples, part: see :meth:`Lowered.recording`; attention maps are of all tokens.
        control: take the base's cross-attention maps of unchanged words.
    """
    graph_module = copy_graph(lowered.dense)
    passes = list(WHOLE_PASSES)
    if entries is not None:
        keep_values(graph_module, entries)
        behind = passes.index(cancel_scatter_gather) + 1
        passes.insert(behind, record_rows(entries, samples, part))
    cross_replace = lowered.config.cross_replace if control else 0.0
    config = replace(lowered.config, dense_below=EVERY_RESOLUTION, cross_replace=cross_replace)
    run_passes(graph_module, config, tuple(passes))
    if entries is not None:
        pack_recorded(graph_module, entries, lowered.kept.formats)
    stages = {name: StageGraph(graph) for name, graph in split_stages(graph_module).items() if name != "fetch"}
    requests = [name for stage in stages.values() for name in stage.names]
    planned = [request for request in requests if isinstance(request, PlanTensor)]
    mask = torch.ones(1, *lowered.latents, dtype=torch.bool)
    with single_thread():
        plan = plan_edit(mask, planned, batch=lowered.batch, dense_below=EVERY_RESOLUTION)
    maps = [name for name in requests if isinstance(name, CacheEntry)]
    return WholeGraphs(stages, {request: plan.tensor(request) for request in planned}, maps)
