"""The shapes of what a sparse step takes from outside, on the meta device: for counting its work, not for doing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisedit_compile.runtime.program import Program


def step_shapes(program: Program) -> dict[Any, Tensor]:
    """A tensor of the right shape and dtype for every input of the U-Net and every entry of the base's cache.

    The plan's tensors are not among them: they are known where a mask is.
    """
    nodes = {node.name: node for node in program.dense.graph.nodes}
    shapes: dict[Any, Tensor] = {name: _empty(nodes[name].meta["val"]) for name in program.inputs}
    for entry, (shape, dtype) in program.cache.shapes.items():
        shapes[entry] = torch.empty(shape, dtype=dtype, device="meta")
    return shapes


def _empty(val: Tensor) -> Tensor:
    # Not a fake tensor, which is what ``val`` is: with those a walk over a graph takes four times as long.
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device="meta")
