"""A layer norm of a linear layer of rows is stored by the linear layer, beside what it normalises."""

from __future__ import annotations

import pytest
from support.fused import COUNT, behind_a_product, silu
from support.hand_built import CHANNELS, HandBuilt, arguments, assert_means_the_same, aten, only, targets_of
from torch.fx import Node

from fisedit_compile.passes import targets
from fisedit_compile.passes.fusion.fuse_norms import fuse_norms

pytestmark = pytest.mark.usefixtures("one_thread")


def layer_norm(build: HandBuilt, x: Node, *, affine: bool = True) -> Node:
    weights = (build.weight(CHANNELS), build.weight(CHANNELS)) if affine else (None, None)
    return build.op(aten.layer_norm.default, x, [CHANNELS], *weights, 1e-3, path="norm")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_a_linear_layer_stores_both(residual: bool, affine: bool) -> None:
    """As in a transformer block: the norm's result goes into a layer, what it normalised into a sum behind it."""

    def then(build: HandBuilt, x: Node) -> Node:
        if residual:
            x = build.op(aten.add.Tensor, x, x.args[0])
        tokens = build.tokens(x)
        return build.op(aten.mul.Tensor, layer_norm(build, tokens, affine=affine), tokens, path="block")

    done = behind_a_product(then, "linear")
    fused = only(done.after(fuse_norms), targets.LINEAR_ROWS_AND_LAYER_NORM)
    given = arguments(fused)
    there = [given[name] is not None for name in ("residual", "norm_weight", "norm_bias")]
    assert there == [residual, affine, affine]
    assert (given["eps"], given["count"]) == (1e-3, COUNT)
    raw, normed = sorted(fused.users, key=lambda node: node.args[1])
    assert (raw.args, normed.args) == ((fused, 0), (fused, 1))
    assert only(done.after(fuse_norms), aten.mul.Tensor).args == (normed, raw)
    assert targets.LAYER_NORM_ROWS not in targets_of(done.after(fuse_norms))
    assert_means_the_same(done, fuse_norms)


def test_skips_the_norm_of_a_convolution() -> None:
    done = behind_a_product(lambda build, x: layer_norm(build, build.tokens(x)), "conv")
    assert targets.LAYER_NORM_ROWS in targets_of(done.after(fuse_norms))
    assert_means_the_same(done, fuse_norms)


def test_skips_the_norm_of_an_activation() -> None:
    done = behind_a_product(lambda build, x: layer_norm(build, build.tokens(silu(build, x))), "linear")
    assert only(done.after(fuse_norms), targets.LAYER_NORM_ROWS).args[0].target is targets.LINEAR_ROWS
    assert_means_the_same(done, fuse_norms)


def test_of_two_norms_the_second_reads_what_is_stored() -> None:
    def then(build: HandBuilt, x: Node) -> Node:
        tokens = build.tokens(x)
        norms = layer_norm(build, tokens), layer_norm(build, tokens, affine=False)
        return build.op(aten.mul.Tensor, *norms, path="block")

    done = behind_a_product(then, "linear")
    fused = only(done.after(fuse_norms), targets.LINEAR_ROWS_AND_LAYER_NORM)
    assert only(done.after(fuse_norms), targets.LAYER_NORM_ROWS).args[0].args == (fused, 0)
    assert_means_the_same(done, fuse_norms)
