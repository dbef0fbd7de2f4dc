"""The shapes of what a sparse step takes from outside, on the meta device: for counting its work, not for doing it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fisedit_compile.passes.requests import CacheEntry
from fisedit_compile.program import Program


def step_shapes(program: Program) -> dict[Any, Tensor]:
    """A tensor of the right shape and dtype for every input of the U-Net and every entry of the base's cache.

    The plan's tensors are not among them: they are known where a mask is.
    """
    nodes = {node.name: node for node in program.dense.graph.nodes}
    shapes: dict[Any, Tensor] = {name: _empty(nodes[name].meta["val"]) for name in program.inputs}
    shapes.update((entry, _kept(entry, nodes[entry.node])) for entry in program.cache_entries)
    return shapes


def _empty(val: Tensor) -> Tensor:
    # Not a fake tensor, which is what ``val`` is: with those a walk over a graph takes four times as long.
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")


def _kept(entry: CacheEntry, node: Node) -> Tensor:
    val: Tensor = node.meta["val"]
    if entry.kind == "map":  # [B*H*W, *channels]
        layout = node.meta["layout"]
        pixels = math.prod(val.shape[dim] for dim in layout.order[: layout.pixel_dims])
        return torch.empty([pixels, *layout.channels(val.shape)], dtype=val.dtype, device="meta")
    wide = torch.promote_types(val.dtype, torch.float32)
    groups: Any = node.args[1]
    return torch.empty([val.shape[0], groups], dtype=wide, device="meta")  # statistics
