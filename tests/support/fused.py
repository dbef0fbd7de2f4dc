"""What the tests of ``fuse_pointwise`` and ``fuse_norms`` share: products, what follows them, and what is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from support.hand_built import (
    BATCH,
    CHANNELS,
    CONFIG,
    SIZE,
    HandBuilt,
    Snapshots,
    arguments,
    aten,
    snapshots,
)
from torch.fx import Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.passes import targets
from fisedit_compile.passes.fusion.fuse_pointwise import fuse_pointwise

Build = Callable[[HandBuilt, Node], Node]
COUNT, SAMPLE = PlanTensor("count", SIZE), PlanTensor("sample", SIZE)
NO_PRODUCT = "it follows no product that it alone reads"


def behind_a_product(then: Build, kind: str = "conv", config: SparsityConfig = CONFIG) -> Snapshots:
    """A convolution of the latents, or a linear layer of them as tokens, and what follows it."""
    build = HandBuilt()
    x = build.op(aten.tanh.default, build.latents())
    return snapshots(build.output(then(build, product(build, x, kind))), config)


def product(build: HandBuilt, x: Node, kind: str = "conv") -> Node:
    return build.conv(x, kernel=3 if kind == "conv" else 1, path="product")


def embedding(build: HandBuilt) -> Node:
    """A value of each sample and channel, as a time embedding is: [B, C, 1, 1]."""
    weight = build.op(aten.tanh.default, build.weight(BATCH, CHANNELS))
    return build.op(aten.reshape.default, weight, [BATCH, CHANNELS, 1, 1])


def norm(build: HandBuilt, x: Node) -> Node:
    weights = build.weight(CHANNELS), build.weight(CHANNELS)
    return build.op(aten.group_norm.default, x, 2, *weights, 1e-5, path="norm")


def silu(build: HandBuilt, x: Node) -> Node:
    return build.op(aten.silu.default, x, path="silu")


def normed_and_raw(build: HandBuilt, x: Node) -> Node:
    """As a ResNet's output is read: by the next norm, and as the next residual."""
    normed = silu(build, norm(build, x))
    return build.op(aten.mul.Tensor, normed, x, path="block")


def products(done: Snapshots) -> list[Node]:
    kinds = (targets.CONV2D_ROWS, targets.CONV2D_ROWS_AND_NORM, targets.LINEAR_ROWS, targets.LINEAR_ROWS_AND_NORM)
    return [node for node in done.after(fuse_pointwise).graph.nodes if node.target in kinds]


def epilogue(node: Node) -> dict[str, Any]:
    """The arguments of a product behind its operands: what follows it, and the count of rows."""
    operands = ("rows", "halo", "weight", "bias", "table")
    return {name: value for name, value in arguments(node).items() if name not in operands}


def left(done: Snapshots) -> list[Any]:
    """Operations on rows that are no products, but for those of ``"block"``, which stand around what is tested."""
    pointwise = targets.UNARY | targets.BINARY | {targets.GROUP_NORM_ROWS, targets.CAT_NORM_ROWS, aten.chunk.default}
    graph = done.after(fuse_pointwise).graph
    return [n.target for n in graph.nodes if n.target in pointwise and n.meta.get("module_path") != "block"]


def beside_a_product(then: Build) -> Snapshots:
    """What follows a value that is no product: a sum with twice itself."""
    build = HandBuilt()
    x = build.conv(build.latents())
    return snapshots(build.output(then(build, build.op(aten.add.Tensor, x, x))))
