"""What works on each pixel alone runs on rows as it is, and every view and transpose vanishes."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from support.hand_built import (
    BATCH,
    CHANNELS,
    HEADS,
    SIZE,
    TOKENS,
    HandBuilt,
    assert_every_step_means_the_same,
    aten,
    only,
    snapshots,
    targets_of,
)
from torch.fx import GraphModule, Node

from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.passes import targets
from fisedit_compile.passes.fusion.fuse_pointwise import fuse_pointwise
from fisedit_compile.passes.sparsify.sparsify_pointwise import sparsify_pointwise

pytestmark = pytest.mark.usefixtures("one_thread")

Build = Callable[[HandBuilt, Node], Node]


def behind_a_convolution(then: Build) -> GraphModule:
    build = HandBuilt()
    return build.output(then(build, build.conv(build.latents())))


def unary(op: object, *args: object, **kwargs: object) -> Build:
    return lambda build, x: build.op(op, x, *args, **kwargs)


@pytest.mark.parametrize(
    "then",
    [
        unary(aten.silu.default),
        unary(aten.gelu.default, approximate="tanh"),
        unary(aten.leaky_relu.default, 0.2),
        unary(aten.clamp.default, -0.5, 0.5),
        unary(aten.clamp.default, max=0.5),
        unary(aten.pow.Tensor_Scalar, 2),
        unary(aten.add.Tensor, 1.5, alpha=2),
        unary(aten.mul.Scalar, 0.5),
        unary(aten.clone.default),
        unary(aten.contiguous.default),
        lambda build, x: build.op(
            aten.to.dtype, build.op(aten.to.dtype, build.op(aten.tanh.default, x), torch.float32), torch.float64
        ),
    ],
)
def test_activations(then: Build) -> None:
    graph_module = behind_a_convolution(then)
    operation = graph_module.graph.output_node().args[0]
    done = snapshots(graph_module)
    assert done.skips() == []
    rows = only(done.before(fuse_pointwise), targets.SCATTER_ROWS).args[0]
    if operation.target in targets.COPY:  # rows have one order only
        assert rows.target is targets.CONV2D_ROWS
    else:
        assert (rows.target, rows.args[1:], rows.kwargs) == (operation.target, operation.args[1:], operation.kwargs)
        assert rows.meta["module_path"] == "block"
    assert_every_step_means_the_same(done)


@pytest.mark.parametrize("op", [aten.clone.default, aten.contiguous.default])
def test_a_copy_to_channels_last(op: object) -> None:
    done = snapshots(behind_a_convolution(unary(op, memory_format=torch.channels_last)))
    assert_every_step_means_the_same(done)


#: An operand without space -> its shape.
OPERANDS = {
    "time embedding": (BATCH, CHANNELS, 1, 1),
    "scale of channels": (CHANNELS, 1, 1),
    "one for the batch": (1, CHANNELS, 1, 1),
    "one for each sample": (BATCH, 1, 1, 1),
    "0-dimensional": (),
    "one number": (1,),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("op", [aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor])
@pytest.mark.parametrize("operand", OPERANDS)
def test_an_operand_without_space_is_broadcast_over_the_rows_of_its_sample(
    operand: str, op: object, first: bool
) -> None:
    build = HandBuilt()
    x, other = build.conv(build.latents()), build.weight(*OPERANDS[operand])
    done = snapshots(build.output(build.op(op, *((other, x) if first else (x, other)))))
    assert done.skips() == []
    assert_every_step_means_the_same(done)


def test_exact_rewriting_of_a_time_embedding() -> None:
    build = HandBuilt()
    sample, temb = build.latents(), build.input("temb", BATCH, CHANNELS)
    temb = build.op(aten.reshape.default, temb, [BATCH, CHANNELS, 1, 1])
    done = snapshots(build.output(build.op(aten.add.Tensor, build.conv(sample), temb, path="resnet")))
    total = only(done.before(fuse_pointwise), aten.add.Tensor)
    rows, per_row = total.args
    assert rows.target is targets.CONV2D_ROWS
    assert per_row.target is aten.index_select.default
    assert (per_row.args[1], per_row.args[2].meta["request"]) == (0, PlanTensor("sample", SIZE))
    assert total.meta["module_path"] == "resnet"
    assert_every_step_means_the_same(done)


def test_on_tokens_an_operand_is_broadcast_too() -> None:
    build = HandBuilt()
    sample, shift = build.latents(), build.input("shift", BATCH, 1, CHANNELS)
    done = snapshots(build.output(build.op(aten.add.Tensor, build.tokens(build.conv(sample)), shift)))
    assert done.skips() == []
    assert_every_step_means_the_same(done)


def test_a_residual_of_the_caller_is_gathered_once() -> None:
    """ControlNet's residuals are inputs of the shape of a map."""
    build = HandBuilt()
    sample, residual = build.latents(), build.input("residual", BATCH, CHANNELS, *SIZE)
    done = snapshots(build.output(build.conv(build.op(aten.add.Tensor, build.conv(sample), residual))))
    assert only(done.final, targets.GATHER_ROWS).args[0].target == "residual"
    assert_every_step_means_the_same(done)


def test_the_same_value_twice() -> None:
    done = snapshots(behind_a_convolution(lambda build, x: build.op(aten.mul.Tensor, x, x)))
    a, b = only(done.final, aten.mul.Tensor).args
    assert a is b
    assert_every_step_means_the_same(done)


@pytest.mark.parametrize(
    ("form", "dim", "row_dim"), [("map", 1, 1), ("map", -3, 1), ("tokens", 2, 1), ("heads", 1, 1), ("heads", -1, 2)]
)
def test_cat_along_channels(form: str, dim: int, row_dim: int) -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        if form != "map":
            x = build.tokens(x)
        if form == "heads":
            x = build.heads(x)
        return build.op(aten.cat.default, [x, build.op(aten.neg.default, x), x], dim, path="cat")

    done = snapshots(behind_a_convolution(then))
    parts, along = only(done.final, aten.cat.default).args
    assert (len(parts), along) == (3, row_dim)
    assert_every_step_means_the_same(done)


@pytest.mark.parametrize(("split", "size"), [(aten.chunk.default, 2), (aten.split.Tensor, 3)])
def test_pieces_along_channels_share_their_chunk(split: object, size: int) -> None:
    """GEGLU: one linear layer, two halves."""

    def then(build: HandBuilt, x: Node) -> Node:
        tokens = build.tokens(x)
        wide = build.op(aten.linear.default, tokens, build.weight(6, CHANNELS), build.weight(6))
        pieces = build.op(split, wide, size, -1)
        value, gate = (build.op(operator.getitem, pieces, number) for number in (0, 1))
        return build.op(aten.mul.Tensor, value, build.op(aten.gelu.default, gate))

    done = snapshots(behind_a_convolution(then))
    graph_module = done.before(fuse_pointwise)
    assert only(graph_module, split).args[1:] == (size, 1)
    assert [node.args[1] for node in graph_module.graph.find_nodes(op="call_function", target=targets.GETITEM)] == [
        0,
        1,
    ]
    assert_every_step_means_the_same(done)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_on_tokens_and_on_a_channels_last_map(bias: bool) -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        x = build.op(aten.permute.default, x, [0, 2, 3, 1])
        weights = [build.weight(7, CHANNELS), *([build.weight(7)] if bias else [])]
        return build.op(aten.permute.default, build.op(aten.linear.default, x, *weights), [0, 3, 1, 2])

    done = snapshots(behind_a_convolution(then))
    assert only(done.before(fuse_pointwise), targets.LINEAR).args[0].target is targets.CONV2D_ROWS
    assert_every_step_means_the_same(done)


def test_views_and_transposes_of_pixels_vanish() -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        tokens = build.op(aten.neg.default, build.tokens(x))
        x = build.op(aten.reshape.default, tokens, [BATCH, *SIZE, CHANNELS])
        x = build.op(aten.permute.default, x, [0, 3, -3, -2])
        flat = build.op(aten.flatten.using_ints, x, 2)
        return build.op(aten.unflatten.int, flat, 2, list(SIZE))

    done = snapshots(behind_a_convolution(then))
    behind = targets_of(done.final)[targets_of(done.final).index(targets.CONV2D_ROWS) + 1 :]
    assert behind == [aten.neg.default, targets.SCATTER_ROWS]
    assert_every_step_means_the_same(done)


def test_heads_are_a_regrouping_of_channels() -> None:
    done = snapshots(behind_a_convolution(lambda build, x: build.heads(build.tokens(x))))
    unflatten = only(done.after(sparsify_pointwise), aten.unflatten.int)
    assert unflatten.args[1:] == (1, [HEADS, CHANNELS // HEADS])
    assert_every_step_means_the_same(done)


def test_transposed_channel_dimensions_are_transposed_on_rows() -> None:
    """A channel shuffle: [B, C, H, W] -> [B, 2, C/2, H, W] -> its first two swapped -> [B, C, H, W]."""

    def then(build: HandBuilt, x: Node) -> Node:
        x = build.op(aten.reshape.default, x, [BATCH, 2, CHANNELS // 2, *SIZE])
        x = build.op(aten.transpose.int, x, 1, -3)
        return build.op(aten.reshape.default, x, [BATCH, CHANNELS, *SIZE])

    done = snapshots(behind_a_convolution(then))
    assert done.skips() == []
    permutes = [node.args[1] for node in done.final.graph.find_nodes(op="call_function", target=aten.permute.default)]
    assert [0, 2, 1] in permutes
    assert_every_step_means_the_same(done)


def test_views_of_a_map_of_one_channel() -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        return build.tokens(build.conv(x, out=1))

    assert_every_step_means_the_same(snapshots(behind_a_convolution(then)))


def test_text_beside_the_region_stays_as_it_is() -> None:
    build = HandBuilt()
    sample, text = build.latents(), build.input("text", BATCH, TOKENS, CHANNELS)
    mean = build.op(aten.mean.dim, build.op(aten.silu.default, text), [1])
    shift = build.op(aten.reshape.default, mean, [BATCH, CHANNELS, 1, 1])
    done = snapshots(build.output(build.op(aten.add.Tensor, build.conv(sample), shift)))
    assert only(done.final, aten.silu.default).args[0].target == "text"
    assert_every_step_means_the_same(done)
