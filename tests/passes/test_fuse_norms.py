"""Norms of rows, in the products before them or joined with what is before them: ``fuse_pointwise``, ``fuse_norms``."""

from __future__ import annotations

import pytest
from support.fused import (
    COUNT,
    NO_PRODUCT,
    SAMPLE,
    Build,
    behind_a_product,
    beside_a_product,
    embedding,
    epilogue,
    left,
    norm,
    normed_and_raw,
    product,
    products,
    silu,
)
from support.hand_built import (
    BATCH,
    CHANNELS,
    SIZE,
    HandBuilt,
    Snapshots,
    arguments,
    assert_means_the_same,
    aten,
    only,
    snapshots,
    targets_of,
)
from torch.fx import Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.passes import targets
from fisedit_compile.passes.fusion.fuse_norms import fuse_norms
from fisedit_compile.passes.fusion.fuse_pointwise import fuse_pointwise

pytestmark = pytest.mark.usefixtures("one_thread")

#: The scale and shift of the one group norm of a graph.
ENTRIES = {"scale": CacheEntry("group_norm_default", "scale"), "shift": CacheEntry("group_norm_default", "shift")}


def test_2_silu_of_a_norm() -> None:
    done = beside_a_product(lambda build, x: silu(build, norm(build, x)))
    normed = only(done.after(fuse_norms), targets.GROUP_NORM_ROWS)
    assert arguments(normed) == {"rows": aten.add.Tensor, "sample": SAMPLE, **ENTRIES, "silu": True, "count": COUNT}
    assert aten.silu.default not in targets_of(done.after(fuse_pointwise))
    assert ("norm", "it follows no product and joins no two values") in done.skips("fuse_norms")
    assert_means_the_same(done, fuse_pointwise)


def test_2_skips_silu_where_the_norm_is_read_as_well() -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        normed = norm(build, x)
        return build.op(aten.mul.Tensor, silu(build, normed), normed)

    done = beside_a_product(then)
    given = arguments(only(done.after(fuse_norms), targets.GROUP_NORM_ROWS))
    assert (given["count"], "silu" in given) == (COUNT, False)
    assert aten.silu.default in targets_of(done.after(fuse_pointwise))
    assert ("silu", NO_PRODUCT) in done.skips("fuse_pointwise")
    assert_means_the_same(done, fuse_pointwise)


@pytest.mark.parametrize("activation", ["none", "silu"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_5_a_norm_alone(kind: str, activation: str) -> None:
    done = behind_a_product(
        lambda build, x: silu(build, norm(build, x)) if activation == "silu" else norm(build, x), kind
    )
    (fused,) = products(done)
    assert epilogue(fused) == {"count": COUNT, "sample": SAMPLE, **ENTRIES} | (
        {"activation": "silu"} if activation == "silu" else {}
    )
    assert left(done) == []
    assert_means_the_same(done, fuse_pointwise)


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_5_a_norm_of_what_is_read_as_well(kind: str) -> None:
    done = behind_a_product(normed_and_raw, kind)
    (fused,) = products(done)
    assert fused.target is (targets.CONV2D_ROWS_AND_NORM if kind == "conv" else targets.LINEAR_ROWS_AND_NORM)
    assert list(epilogue(fused)) == ["count", "sample", "scale", "shift", "activation"]
    raw, normed = sorted(fused.users, key=lambda node: node.args[1])
    assert [node.args for node in (raw, normed)] == [(fused, 0), (fused, 1)]
    assert only(done.after(fuse_pointwise), aten.mul.Tensor).args == (normed, raw)
    assert raw.meta["row_layout"].size == normed.meta["row_layout"].size == SIZE
    assert_means_the_same(done, fuse_pointwise)


def test_5_behind_embedding_and_residual_that_are_read_as_well() -> None:
    build = HandBuilt()
    x = build.op(aten.tanh.default, build.latents())
    out = build.op(aten.add.Tensor, product(build, x), embedding(build))
    out = build.op(aten.add.Tensor, out, x)
    done = snapshots(build.output(normed_and_raw(build, out)))
    (fused,) = products(done)
    names = ["count", "sample", "sample_bias", "residual", "scale", "shift", "activation"]
    assert list(epilogue(fused)) == names
    assert left(done) == []
    assert_means_the_same(done, fuse_pointwise)


def test_5_of_two_norms_one_is_in_the_product_and_the_other_reads_the_raw_value() -> None:
    done = behind_a_product(
        lambda build, x: build.op(aten.mul.Tensor, norm(build, x), silu(build, norm(build, x)), path="block")
    )
    (fused,) = products(done)
    raw, _ = sorted(fused.users, key=lambda node: node.args[1])
    other = only(done.after(fuse_pointwise), targets.GROUP_NORM_ROWS)
    assert other.args[0] is raw
    assert arguments(fused)["scale"].node != arguments(other)["scale"].node
    assert_means_the_same(done, fuse_pointwise)


def test_5_skips_a_norm_with_its_own_statistics() -> None:
    """On a whole level: it needs all pixels of the product first. Nor has any row there a count."""
    build = HandBuilt()
    small = build.conv(build.latents(), stride=[2, 2])
    small = build.op(aten.add.Tensor, build.conv(small, path="mid"), small)
    small = silu(build, norm(build, small))
    large = build.op(aten.upsample_nearest2d.vec, small, list(SIZE), None)
    done = snapshots(build.output(build.conv(large, path="up")), SparsityConfig(dense_below=5))
    assert [list(epilogue(node)) for node in products(done)] == [[], ["residual"], ["count"]]
    given = arguments(only(done.after(fuse_pointwise), targets.GROUP_NORM_WHOLE))
    assert (given["eps"], given["silu"]) == (1e-5, True)
    assert done.skips("fuse_pointwise") == []
    assert_means_the_same(done, fuse_pointwise)


def side_by_side(parts: int, then: Build) -> Snapshots:
    """Where a U-Net's skips come in: values side by side, and what reads them."""
    build = HandBuilt()
    sample = build.latents()
    values = [build.conv(sample, path=f"part{i}") for i in range(parts)]
    return snapshots(build.output(then(build, build.op(aten.cat.default, values, 1, path="cat"))))


def wide_norm(build: HandBuilt, x: Node) -> Node:
    weights = build.weight(x.meta["val"].shape[1]), build.weight(x.meta["val"].shape[1])
    return build.op(aten.group_norm.default, x, 2, *weights, 1e-5, path="norm")


@pytest.mark.parametrize("activation", [True, False])
def test_the_norm_of_two_values_side_by_side(activation: bool) -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        normed = wide_norm(build, x)
        return build.op(aten.mul.Tensor, silu(build, normed) if activation else normed, x)

    done = side_by_side(2, then)
    both = only(done.after(fuse_norms), targets.CAT_NORM_ROWS)
    parts = {"left": targets.CONV2D_ROWS, "right": targets.CONV2D_ROWS}
    silu_or_not = {"silu": True} if activation else {}
    assert arguments(both) == {**parts, "sample": SAMPLE, **ENTRIES, **silu_or_not, "count": COUNT}
    joined, normed = sorted(both.users, key=lambda node: node.args[1])
    assert only(done.after(fuse_norms), aten.mul.Tensor).args == (normed, joined)
    assert (joined.meta["module_path"], normed.meta["module_path"]) == ("cat", "norm")
    assert aten.cat.default not in targets_of(done.after(fuse_norms))
    assert_means_the_same(done, fuse_norms)


def test_skips_three_values() -> None:
    done = side_by_side(3, wide_norm)
    assert len(only(done.after(fuse_norms), aten.cat.default).args[0]) == 3
    given = arguments(only(done.after(fuse_norms), targets.GROUP_NORM_ROWS))
    assert (given["count"], "silu" in given) == (COUNT, False)
    assert {path for path, _ in done.skips("fuse_norms")} == {"cat", "norm"}
    assert_means_the_same(done, fuse_norms)


def test_skips_values_that_no_norm_reads() -> None:
    done = side_by_side(2, silu)
    assert ("cat", "no norm with the base's statistics reads it") in done.skips("fuse_norms")
    assert_means_the_same(done, fuse_norms)


def test_of_two_norms_the_second_reads_the_joined_rows() -> None:
    done = side_by_side(2, lambda build, x: build.op(aten.mul.Tensor, wide_norm(build, x), wide_norm(build, x)))
    both, other = (
        only(done.after(fuse_norms), targets.CAT_NORM_ROWS),
        only(done.after(fuse_norms), targets.GROUP_NORM_ROWS),
    )
    assert other.args[0].args == (both, 0)
    assert_means_the_same(done, fuse_norms)


@pytest.mark.parametrize("given", [0, 1, 2, 3])
def test_a_layer_norm(given: int) -> None:
    """``given`` optional arguments: weight, bias, eps."""

    def then(build: HandBuilt, x: Node) -> Node:
        options = build.weight(CHANNELS), build.weight(CHANNELS), 1e-3
        return build.op(aten.layer_norm.default, build.tokens(x), [CHANNELS], *options[:given], path="norm")

    done = behind_a_product(then)
    layer_norm = only(done.after(fuse_norms), targets.LAYER_NORM_ROWS)
    found = arguments(layer_norm)
    assert found["rows"] is targets.CONV2D_ROWS
    assert [found[name] is not None for name in ("weight", "bias")] == [given > 0, given > 1]
    assert (found["eps"], found["count"]) == (1e-3 if given > 2 else 1e-5, COUNT)
    assert_means_the_same(done, fuse_norms)


@pytest.mark.parametrize("shape", [[CHANNELS // 2], [2, CHANNELS // 2]])
def test_skips_a_layer_norm_of_more_or_less_than_the_channels(shape: list[int]) -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        split = build.op(aten.view.default, build.tokens(x), [BATCH, -1, 2, CHANNELS // 2])
        return build.op(aten.layer_norm.default, split, shape)

    done = behind_a_product(then)
    assert only(done.after(fuse_norms), targets.LAYER_NORM).args[1] == shape
    assert_means_the_same(done, fuse_norms)


def test_a_layer_norm_of_a_whole_level_has_no_count() -> None:
    build = HandBuilt()
    small = build.conv(build.latents(), stride=[2, 2])
    tokens = build.op(aten.layer_norm.default, build.tokens(small), [CHANNELS])
    small = build.op(aten.permute.default, build.op(aten.reshape.default, tokens, [BATCH, 3, 3, 4]), [0, 3, 1, 2])
    large = build.op(aten.upsample_nearest2d.vec, small, list(SIZE), None)
    done = snapshots(build.output(build.conv(large)), SparsityConfig(dense_below=5))
    assert list(arguments(only(done.after(fuse_norms), targets.LAYER_NORM_ROWS))) == ["rows", "weight", "bias", "eps"]
    assert_means_the_same(done, fuse_norms)


def test_a_resnet_is_two_products() -> None:
    """norm, silu, conv, embedding, norm, silu, conv, residual: the second norm and both sums are in the products."""
    build = HandBuilt()
    x = build.conv(build.latents(), path="in")
    h = build.conv(silu(build, norm(build, x)), path="conv1")
    h = build.op(aten.add.Tensor, h, embedding(build))
    h = build.conv(silu(build, norm(build, h)), path="conv2")
    done = snapshots(build.output(build.op(aten.add.Tensor, x, h)))
    assert [(node.target, node.meta["module_path"]) for node in products(done)] == [
        (targets.CONV2D_ROWS_AND_NORM, "in"),
        (targets.CONV2D_ROWS, "conv1"),
        (targets.CONV2D_ROWS, "conv2"),
    ]
    assert left(done) == []
    assert done.skips("fuse_pointwise") == []
    assert_means_the_same(done, fuse_pointwise)
