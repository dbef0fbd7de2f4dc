"""What follows a product of rows is part of it: sums and activations, and what must be left as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.fused import (
    COUNT,
    NO_PRODUCT,
    SAMPLE,
    Build,
    behind_a_product,
    embedding,
    epilogue,
    left,
    norm,
    product,
    products,
    silu,
)
from support.hand_built import (
    BATCH,
    CHANNELS,
    CONFIG,
    PIXELS,
    SIZE,
    TOKENS,
    HandBuilt,
    assert_means_the_same,
    aten,
    only,
    snapshots,
    targets_of,
)
from torch.fx import Graph, GraphModule, Node

from fisedit_compile.ir.layout import Layout
from fisedit_compile.passes import targets
from fisedit_compile.passes.fusion.fuse_pointwise import fuse_pointwise
from fisedit_compile.passes.rewriting import make_call

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("bias", [True, False])
def test_1_a_linear_layer_of_rows(bias: bool) -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        weights = [build.weight(7, CHANNELS), *([build.weight(7)] if bias else [])]
        return build.op(aten.linear.default, build.tokens(x), *weights, path="linear")

    done = behind_a_product(then)
    first, second = products(done)
    assert (first.target, epilogue(first)) == (targets.CONV2D_ROWS, {"count": COUNT})
    assert (second.target, epilogue(second)) == (targets.LINEAR_ROWS, {"count": COUNT})
    assert second.args[0] is first
    assert (second.args[2] is not None) == bias
    assert second.meta["module_path"] == "linear"
    assert_means_the_same(done, fuse_pointwise)


def test_1_skips_a_linear_layer_that_is_not_on_rows() -> None:
    build = HandBuilt()
    sample, text = build.latents(), build.input("text", BATCH, TOKENS, CHANNELS)
    of_text = build.op(aten.linear.default, text, build.weight(CHANNELS, CHANNELS))
    shift = build.op(aten.reshape.default, build.op(aten.mean.dim, of_text, [1]), [BATCH, CHANNELS, 1, 1])
    done = snapshots(build.output(build.op(aten.mul.Tensor, build.conv(sample), shift)))
    assert only(done.after(fuse_pointwise), targets.LINEAR).args[0].target == "text"


def test_1_skips_a_linear_layer_of_each_head() -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        heads = build.heads(build.tokens(x))
        return build.unheads(build.op(aten.linear.default, heads, build.weight(2, 2)))

    done = behind_a_product(then)
    assert only(done.after(fuse_pointwise), targets.LINEAR).meta["row_layout"].roles == "bcsc"
    assert_means_the_same(done, fuse_pointwise)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_3_the_time_embedding(kind: str, first: bool) -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        both = x, embedding(build)
        return build.op(aten.add.Tensor, *(both if first else both[::-1]), path="sum")

    done = behind_a_product(then, kind)
    (fused,) = products(done)
    assert epilogue(fused) == {"count": COUNT, "sample": SAMPLE, "sample_bias": aten.reshape.default}
    assert left(done) == []
    assert "sum" in [change.module_path for change in done.reports["fuse_pointwise"].changes]
    assert_means_the_same(done, fuse_pointwise)


def test_3_skips_a_second_one() -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        for path in ("first", "second"):
            x = build.op(aten.add.Tensor, x, embedding(build), path=path)
        return x

    done = behind_a_product(then)
    assert left(done) == [aten.add.Tensor]
    assert ("second", NO_PRODUCT) in done.skips("fuse_pointwise")
    assert_means_the_same(done, fuse_pointwise)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_4_a_residual(kind: str, first: bool) -> None:
    build = HandBuilt()
    x = build.op(aten.tanh.default, build.latents())
    both = product(build, x, kind), x
    done = snapshots(build.output(build.op(aten.add.Tensor, *(both if first else both[::-1]), path="sum")))
    (fused,) = products(done)
    assert epilogue(fused) == {"count": COUNT, "residual": aten.tanh.default}
    assert left(done) == []
    assert_means_the_same(done, fuse_pointwise)


def test_4_of_two_products_the_later_takes_the_other_as_its_residual() -> None:
    build = HandBuilt()
    x = build.op(aten.tanh.default, build.latents())
    done = snapshots(build.output(build.op(aten.add.Tensor, product(build, x), product(build, x, "linear"))))
    assert sorted(len(epilogue(node)) for node in products(done)) == [1, 2]
    assert left(done) == []
    assert_means_the_same(done, fuse_pointwise)


def test_4_a_sum_of_the_embedding_and_the_residual() -> None:
    build = HandBuilt()
    x = build.op(aten.tanh.default, build.latents())
    out = build.op(aten.add.Tensor, product(build, x), embedding(build))
    done = snapshots(build.output(build.op(aten.add.Tensor, x, out)))
    (fused,) = products(done)
    assert epilogue(fused) == {
        "count": COUNT,
        "sample": SAMPLE,
        "sample_bias": aten.reshape.default,
        "residual": aten.tanh.default,
    }
    assert_means_the_same(done, fuse_pointwise)


def of_the_latents(op: Any) -> Build:
    """The sum of the product and another value of the latents."""
    return lambda build, x: build.op(op, x, build.op(aten.neg.default, next(iter(build.graph.nodes)), path="other"))


def test_4_skips_a_second_residual() -> None:
    done = behind_a_product(
        lambda build, x: of_the_latents(aten.add.Tensor)(build, of_the_latents(aten.add.Tensor)(build, x))
    )
    assert targets_of(done.after(fuse_pointwise)).count(aten.add.Tensor) == 1
    assert list(epilogue(products(done)[0])) == ["count", "residual"]
    assert_means_the_same(done, fuse_pointwise)


@pytest.mark.parametrize(
    "then",
    [
        of_the_latents(aten.sub.Tensor),
        of_the_latents(aten.mul.Tensor),
        lambda build, x: build.op(aten.add.Tensor, x, x),
        lambda build, x: build.op(aten.add.Tensor, x, 1.5),
        lambda build, x: build.op(aten.add.Tensor, x, embedding(build), alpha=2),
        lambda build, x: build.op(aten.add.Tensor, embedding(build), x, alpha=2),
        lambda build, x: build.op(aten.mul.Tensor, x, embedding(build)),
        lambda build, x: build.op(aten.add.Tensor, x, build.weight(CHANNELS, 1, 1)),
        lambda build, x: build.op(aten.add.Tensor, x, build.weight(BATCH, 1, 1, 1)),
        lambda build, x: build.op(aten.gelu.default, x),
        lambda build, x: build.op(aten.neg.default, x),
    ],
    ids=[
        "difference",
        "product",
        "itself",
        "a number",
        "alpha",
        "alpha of it",
        "scale",
        "channels",
        "samples",
        "gelu",
        "neg",
    ],
)
def test_skips_what_no_epilogue_does(then: Build) -> None:
    done = behind_a_product(then)
    (plain,) = products(done)
    assert epilogue(plain) == {"count": COUNT}
    assert len(done.skips("fuse_pointwise")) >= 2  # the activation of the latents, and what follows the product
    assert_means_the_same(done, fuse_pointwise)


def test_skips_a_sum_of_rows_of_another_resolution() -> None:
    """No dense graph has it; as many rows by chance must not make one of them the other's residual."""
    graph, pixels = Graph(), BATCH * PIXELS
    latents = graph.placeholder("sample")
    latents.meta.update(layout=Layout("bchw", SIZE), val=torch.empty(BATCH, CHANNELS, *SIZE))
    shapes = {"rows": (pixels, 4), "weight": (4, 4), "table": (pixels, 1), "other": (pixels, 4)}
    rows, weight, table, other = (graph.placeholder(name) for name in shapes)
    for node, shape in zip((rows, weight, table, other), shapes.values(), strict=True):
        node.meta["val"] = torch.empty(shape)
    place = {"module_path": "", "row_layout": Layout("bchw", SIZE)}
    conv = make_call(graph, targets.CONV2D_ROWS, (rows, None, weight, None, table), **place)
    total = make_call(graph, aten.add.Tensor, (conv, other), **place)
    other.meta["row_layout"] = Layout("bchw", (3, 3))
    graph.output(total)
    graph_module = GraphModule({}, graph)
    fuse_pointwise(graph_module, CONFIG)
    assert targets_of(graph_module) == [targets.CONV2D_ROWS, aten.add.Tensor]


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_6_silu(kind: str) -> None:
    done = behind_a_product(silu, kind)
    (fused,) = products(done)
    assert epilogue(fused) == {"count": COUNT, "activation": "silu"}
    assert left(done) == []
    assert_means_the_same(done, fuse_pointwise)


def test_6_nothing_comes_behind_an_activation() -> None:
    done = behind_a_product(lambda build, x: norm(build, silu(build, x)))
    assert epilogue(products(done)[0]) == {"count": COUNT, "activation": "silu"}
    assert targets.GROUP_NORM_ROWS in targets_of(done.after(fuse_pointwise))
    assert_means_the_same(done, fuse_pointwise)


def test_skips_a_product_that_is_read_twice_and_by_no_norm() -> None:
    done = behind_a_product(lambda build, x: build.op(aten.mul.Tensor, silu(build, x), x))
    assert epilogue(products(done)[0]) == {"count": COUNT}
    assert ("silu", NO_PRODUCT) in done.skips("fuse_pointwise")
    assert_means_the_same(done, fuse_pointwise)


def test_skips_what_a_dense_operation_reads_or_gives() -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        rolled = build.op(aten.roll.default, build.op(aten.add.Tensor, x, embedding(build)), [1], [3])
        return norm(build, silu(build, rolled))

    done = behind_a_product(then)
    (fused,) = products(done)
    assert list(epilogue(fused)) == ["count", "sample", "sample_bias"]  # up to the roll, and not beyond
    assert [user.target for user in fused.users] == [targets.SCATTER_ROWS]
    assert {aten.silu.default, targets.GROUP_NORM_ROWS} <= set(targets_of(done.after(fuse_pointwise)))
    assert_means_the_same(done, fuse_pointwise)
