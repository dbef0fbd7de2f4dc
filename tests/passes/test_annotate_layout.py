"""Which values are taken to lie in space, and how; and all that ends the region, with path and reason."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from support.hand_built import (
    BATCH,
    CHANNELS,
    CONFIG,
    HEIGHT,
    PIXELS,
    SIZE,
    TOKENS,
    WIDTH,
    HandBuilt,
    assert_every_step_means_the_same,
    aten,
    inputs,
    snapshots,
    some_mask,
)
from torch.fx import GraphModule, Node

from fisedit_compile.ir.layout import Layout
from fisedit_compile.passes import targets
from fisedit_compile.passes.region.annotate_layout import annotate_layout
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

Build = Callable[[HandBuilt, Node], Node]
ATTENTION = aten.scaled_dot_product_attention.default


def around(middle: Build) -> GraphModule:
    """A convolution in front, and the latents ahead of everything: an operation in the midst of the region."""
    build = HandBuilt()
    return build.output(middle(build, build.conv(build.latents(), path="first")))


def test_a_value_of_every_form_gets_its_roles() -> None:
    build = HandBuilt()
    x = build.conv(build.latents())
    small = build.conv(x, stride=[2, 2])
    large = build.op(aten.upsample_nearest2d.vec, small, list(SIZE), None)
    tokens = build.tokens(x)
    heads = build.heads(tokens)
    attended = build.op(ATTENTION, heads, heads, heads)
    pieces = build.op(aten.chunk.default, tokens, 2, -1)
    piece = build.op(operator.getitem, pieces, 1)
    build.output(build.op(aten.add.Tensor, build.unheads(attended), large))
    assert x.meta["layout"] == Layout("bchw", SIZE)
    assert small.meta["layout"] == Layout("bchw", (3, 3))
    assert large.meta["layout"] == Layout("bchw", SIZE)
    assert tokens.meta["layout"] == Layout("bsc", SIZE)
    assert heads.args[0].meta["layout"] == Layout("bscc", SIZE)
    assert heads.meta["layout"] == attended.meta["layout"] == Layout("bcsc", SIZE)
    assert pieces.meta["layout"] == piece.meta["layout"] == Layout("bsc", SIZE)


def test_what_depends_on_no_spatial_value_gets_none_and_is_not_reported() -> None:
    build = HandBuilt()
    sample, text = build.latents(), build.input("text", BATCH, TOKENS, CHANNELS)
    keys = build.op(aten.linear.default, text, build.weight(CHANNELS, CHANNELS), None, path="to_k")
    scale = build.op(aten.mean.dim, keys, [1], True)  # [B, 1, C]
    build.graph.output(build.op(aten.add.Tensor, build.tokens(sample), scale))
    report = annotate_layout(GraphModule(build.root, build.graph), CONFIG)
    assert report.skipped == []
    assert not any("layout" in node.meta for node in (text, keys, scale))
    assert report.changed == 4  # the sample, permute, reshape, add


def _grouped(build: HandBuilt, x: Node) -> Node:
    return build.conv(x, groups=2, path="odd")


def _roll(build: HandBuilt, x: Node) -> Node:
    return build.op(aten.roll.default, x, [1], [3], path="odd")


def _pool(build: HandBuilt, x: Node) -> Node:
    return build.op(aten.avg_pool2d.default, x, [3, 3], [1, 1], [1, 1], path="odd")


def _softmax_over_space(build: HandBuilt, x: Node) -> Node:
    return build.op(aten._softmax.default, x, 3, False, path="odd")


def _position_map(build: HandBuilt, x: Node) -> Node:
    return build.op(aten.add.Tensor, x, build.weight(1, 1, HEIGHT, WIDTH), path="odd")


def _broadcast_map(build: HandBuilt, x: Node) -> Node:
    thin = build.conv(x, out=1, path="thin")
    return build.op(aten.mul.Tensor, thin, build.weight(CHANNELS, 1, 1), path="odd")


def _mean_of_the_map(build: HandBuilt, x: Node) -> Node:
    mean = build.op(aten.mean.dim, x, [2, 3], True, path="odd")
    return build.op(aten.mul.Tensor, x, mean, path="scale")


def _cat_over_height(build: HandBuilt, x: Node) -> Node:
    return build.op(aten.cat.default, [x, x], 2, path="odd")


def _cat_of_sizes(build: HandBuilt, x: Node) -> Node:
    taller = build.conv(x, kernel=1, padding=[1, 0], path="taller")
    return build.op(aten.cat.default, [x, taller], 2, path="odd")


def _chunk_over_height(build: HandBuilt, x: Node) -> Node:
    pieces = build.op(aten.chunk.default, x, 2, 2, path="odd")
    return build.op(aten.cat.default, [build.op(operator.getitem, pieces, i) for i in (1, 0)], 2, path="cat")


def _linear_over_width(build: HandBuilt, x: Node) -> Node:
    return build.op(aten.linear.default, x, build.weight(WIDTH, WIDTH), path="odd")


def _layer_norm_over_space(build: HandBuilt, x: Node) -> Node:
    return build.op(aten.layer_norm.default, x, [HEIGHT, WIDTH], path="odd")


def _width_before_height(build: HandBuilt, x: Node) -> Node:
    turned = build.op(aten.transpose.int, x, 2, 3, path="odd")
    return build.op(aten.transpose.int, turned, 2, 3, path="back")


def _view_that_mixes(build: HandBuilt, x: Node) -> Node:
    mixed = build.op(aten.reshape.default, x, [BATCH, 2 * HEIGHT, -1], path="odd")
    return build.op(aten.reshape.default, mixed, [BATCH, CHANNELS, *SIZE], path="back")


#: What ends the region in the middle of a map -> (how it is built, the reason that is given).
SKIPPED = {
    "grouped convolution": (_grouped, "a grouped convolution (groups=2) has no row kernel"),
    "unknown operation": (_roll, "no rule for aten.roll.default: its result is computed dense"),
    "pooling": (_pool, "no rule for aten.avg_pool2d.default: its result is computed dense"),
    "softmax over space": (_softmax_over_space, "no rule for aten._softmax.default: its result is computed dense"),
    "position map": (_position_map, "an operand without a known layout varies over space"),
    "broadcast of a map": (_broadcast_map, "a spatial operand is broadcast"),
    "statistics of the map": (_mean_of_the_map, "no rule for aten.mean.dim: its result is computed dense"),
    "cat over height": (_cat_over_height, "dimension 2 of a 'bchw' value is no channel dimension"),
    "cat of two sizes": (_cat_of_sizes, "its parts lie differently in space"),
    "chunk over height": (_chunk_over_height, "dimension 2 of a 'bchw' value is no channel dimension"),
    "linear over width": (_linear_over_width, "a linear layer over a dimension that is not a channel"),
    "layer norm over space": (_layer_norm_over_space, "a layer norm over dimensions that are not channels"),
    "width before height": (
        _width_before_height,
        "'bcwh' is not a layout: one b, then h and w in order or one s, any number of c",
    ),
    "view of space and channels": (
        _view_that_mixes,
        "the view (2, 4, 6, 5) -> (2, 12, 10) mixes 'c' with its neighbours",
    ),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_what_has_no_rule_is_reported_and_runs_dense(case: str) -> None:
    middle, reason = SKIPPED[case]
    done = snapshots(around(middle))
    assert ("odd", reason) in done.skips("annotate_layout")
    assert_every_step_means_the_same(done)


@pytest.mark.parametrize("case", ["grouped convolution", "unknown operation", "pooling", "position map"])
def test_a_region_starts_anew_behind_it(case: str) -> None:
    middle, _ = SKIPPED[case]
    done = snapshots(around(lambda build, x: build.conv(middle(build, x), path="last")))
    (odd,) = (node for node in done.dense.graph.nodes if node.meta.get("module_path") == "odd")
    assert odd.meta["layout"] == Layout("bchw", SIZE)
    assert "region" not in odd.meta
    assert len(done.skips()) == 1
    rows = done.final.graph.find_nodes(op="call_function", target=targets.CONV2D_ROWS)
    assert [node.meta["module_path"] for node in rows] == ["first", "last"]
    assert_every_step_means_the_same(done)


def attention(build: HandBuilt, x: Node, *mask: object, **options: object) -> Node:
    tokens = build.tokens(x)
    q, k, v = (build.heads(build.op(aten.linear.default, tokens, build.weight(CHANNELS, CHANNELS))) for _ in range(3))
    return build.unheads(build.op(ATTENTION, q, k, v, *mask, path="odd", **options))


def _masked(build: HandBuilt, x: Node) -> Node:
    return attention(build, x, build.weight(PIXELS, PIXELS))


def _causal(build: HandBuilt, x: Node) -> Node:
    return attention(build, x, is_causal=True)


def _causal_by_position(build: HandBuilt, x: Node) -> Node:
    return attention(build, x, None, 0.0, True)


def _three_dimensional(build: HandBuilt, x: Node) -> Node:
    tokens = build.tokens(x)
    out = build.op(ATTENTION, tokens, tokens, tokens, path="odd")
    return build.op(aten.permute.default, build.op(aten.reshape.default, out, [BATCH, *SIZE, CHANNELS]), [0, 3, 1, 2])


def _keys_from_another_resolution(build: HandBuilt, x: Node) -> Node:
    keys = build.heads(build.tokens(build.conv(x, stride=[2, 2], path="small")))
    return build.unheads(build.op(ATTENTION, build.heads(build.tokens(x)), keys, keys, path="odd"))


ATTENTION_SKIPPED = {
    "mask": (_masked, "attention with a mask has no row kernel"),
    "causal": (_causal, "causal, grouped-query or dropped-out attention has no row kernel"),
    "causal, by position": (_causal_by_position, "causal, grouped-query or dropped-out attention has no row kernel"),
    "no heads": (_three_dimensional, "attention whose query is not [B, heads, H*W, channels]"),
    "other resolution": (
        _keys_from_another_resolution,
        "attention whose keys and values lie elsewhere than its queries",
    ),
}


@pytest.mark.parametrize("case", ATTENTION_SKIPPED)
def test_attention_without_a_row_kernel_is_reported_and_runs_dense(case: str) -> None:
    middle, reason = ATTENTION_SKIPPED[case]
    done = snapshots(around(middle))
    assert ("odd", reason) in done.skips("annotate_layout")
    assert_every_step_means_the_same(done)


def _turned_heads(build: HandBuilt, x: Node) -> Node:
    heads = build.heads(build.tokens(x))
    return build.op(aten.add.Tensor, build.unheads(build.op(aten.roll.default, heads, [1], [1], path="odd")), x)


def _masked_heads(build: HandBuilt, x: Node) -> Node:
    return build.op(aten.add.Tensor, _masked(build, x), x)


@pytest.mark.parametrize("middle", [_turned_heads, _masked_heads])
def test_heads_behind_a_dense_operation_are_not_taken_for_a_map(middle: Build) -> None:
    """[B, heads, H*W, d] is 4-dimensional too; a region of H*W x d cells would be cut along rows and columns."""
    dense = around(middle)
    assert {node.meta["layout"].size for node in dense.graph.nodes if "layout" in node.meta} == {SIZE}


def test_active_pixels_are_exact_behind_a_dense_operation_on_heads() -> None:
    """Every value here depends on its own pixel of the convolution alone, so active pixels are those of a dense run."""
    done = snapshots(around(_turned_heads))
    mask = some_mask(0.5)
    base, edit = (done.dense(*inputs(done.dense, seed)) for seed in (0, 1))
    assert_close(done.run_final(0, 1, mask), torch.where(mask[:, None], edit, base))


def test_an_image_prompt_is_not_taken_for_a_map() -> None:
    """IP-Adapter's embeddings are an input [B, images, tokens, C]: 4-dimensional, and of no resolution at all."""
    build = HandBuilt()
    sample, embeds = build.latents(), build.input("image_embeds", BATCH, 1, 8 * TOKENS, CHANNELS)
    keys = build.op(aten.silu.default, embeds, path="image_proj")
    keys = build.heads(build.op(aten.reshape.default, keys, [BATCH, 8 * TOKENS, CHANNELS]))
    query = build.heads(build.tokens(build.conv(sample)))
    done = snapshots(build.output(build.unheads(build.op(ATTENTION, query, keys, keys, path="attn"))))
    assert done.skips() == []
    assert {node.meta["layout"].size for node in done.dense.graph.nodes if "layout" in node.meta} == {SIZE}
    assert_every_step_means_the_same(done)


def test_what_lies_behind_a_lost_layout_is_reported_too() -> None:
    """Never silent: a convolution that runs dense because its input's layout is unknown has to be named."""

    def middle(build: HandBuilt, x: Node) -> Node:
        tokens = build.op(aten._softmax.default, build.tokens(x), 1, False, path="odd")
        x = build.op(aten.reshape.default, tokens, [BATCH, *SIZE, CHANNELS], path="back")
        return build.conv(build.op(aten.permute.default, x, [0, 3, 1, 2], path="back"), path="last")

    done = snapshots(around(middle))
    dense = [node for node in done.final.graph.nodes if node.op == "call_function" and node.target is targets.CONV]
    assert {node.meta["module_path"] for node in dense} <= {path for path, _ in done.skips()}
    assert_every_step_means_the_same(done)


def test_a_broadcast_to_five_dimensions_is_skipped() -> None:
    def middle(build: HandBuilt, x: Node) -> Node:
        five = build.op(aten.mul.Tensor, x, build.weight(1, 1, 1, 1, 1), path="odd")
        return build.op(aten.reshape.default, five, [BATCH, CHANNELS, *SIZE])

    done = snapshots(around(middle))
    assert "odd" in dict(done.skips("annotate_layout"))
    assert_every_step_means_the_same(done)
