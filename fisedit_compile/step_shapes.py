"""The shapes of everything that a sparse step takes, on the meta device: for counting its work, not for doing it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fisedit_compile.mac_tracing import to_meta
from fisedit_compile.passes.hoist_invariants import HOISTED_STAGES
from fisedit_compile.plan import EditPlan
from fisedit_compile.program import Program


def step_shapes(program: Program, plan: EditPlan) -> dict[Any, Tensor]:
    """A tensor for every name and request that the stages of a sparse step take.

    The plan's are the real ones, since the row counts of samples are values; the others have shape and dtype alone.
    """
    nodes = {node.name: node for node in program.dense.graph.nodes}
    values: dict[Any, Tensor] = {name: nodes[name].meta["val"].to("meta") for name in program.inputs}
    for entry in program.cache_entries:
        node = nodes[entry.node]
        val, layout = node.meta["val"], node.meta["layout"]
        shape = [val.shape[0], node.args[1]]  # statistics: [B, groups]
        if entry.kind == "map":  # [B*H*W, *channels]
            shape = [
                math.prod(val.shape[dim] for dim in layout.order[: layout.pixel_dims]),
                *layout.channels(val.shape),
            ]
        values[entry] = torch.empty(shape, dtype=val.dtype, device="meta")
    values.update((request, plan.tensor(request)) for request in program.plan_requests)
    for name in HOISTED_STAGES:
        stage = program.stage(name)
        if stage.outputs:
            with torch.no_grad():
                outputs = to_meta(stage.graph_module)(*(values[each].to("meta") for each in stage.names))
            values.update(zip(stage.outputs, outputs, strict=True))
    return values
