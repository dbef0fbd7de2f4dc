"""Linear layers of one value become one product, whose weights are joined once a model."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from support.hand_built import (
    BATCH,
    CHANNELS,
    TOKENS,
    HandBuilt,
    Snapshots,
    assert_every_step_means_the_same,
    assert_means_the_same,
    aten,
    only,
    snapshots,
    targets_of,
)
from torch.fx import Node

from fisedit_compile.passes import targets
from fisedit_compile.passes.fusion.merge_linears import merge_linears

pytestmark = pytest.mark.usefixtures("one_thread")


def linear(build: HandBuilt, x: Node, width: int = CHANNELS, *, bias: bool = False, path: str = "attn.to") -> Node:
    weights = [build.weight(width, x.meta["val"].shape[-1]), *([build.weight(width)] if bias else [])]
    return build.op(aten.linear.default, x, *weights, path=path)


def total(build: HandBuilt, values: Sequence[Node]) -> Node:
    first, *others = values
    for other in others:
        first = build.op(aten.add.Tensor, first, build.op(aten.tanh.default, other))
    return first


def projections(*biases: bool, width: int = CHANNELS) -> tuple[Snapshots, list[Node]]:
    """Layers that read the tokens of one convolution, and the sum of what they give."""
    build = HandBuilt()
    tokens = build.tokens(build.conv(build.latents()))
    layers = [linear(build, tokens, width, bias=bias, path=f"block.attn.to_{i}") for i, bias in enumerate(biases)]
    return snapshots(build.output(total(build, layers))), layers


def reads(done: Snapshots) -> list[Node]:
    return list(done.after(merge_linears).graph.find_nodes(op="call_function", target=targets.LINEAR))


@pytest.mark.parametrize("bias", [True, False])
def test_exact_rewriting(bias: bool) -> None:
    done, layers = projections(bias, bias, bias)
    graph_module = done.after(merge_linears)
    (merged,) = reads(done)
    rows, weight, joined_bias = merged.args
    assert rows.target is targets.CONV2D_ROWS
    assert weight.target is aten.cat.default
    assert [part.target for part in weight.args[0]] == [layer.args[1].target for layer in layers]
    assert weight.args[1:] == ()
    if bias:
        assert joined_bias.target is aten.cat.default
        assert [part.target for part in joined_bias.args[0]] == [layer.args[2].target for layer in layers]
    else:
        assert joined_bias is None
    pieces = only(graph_module, aten.split_with_sizes.default)
    assert pieces.args == (merged, [CHANNELS] * 3, -1)
    assert merged.users == {pieces: None}
    got = [(piece.args[1], piece.meta["module_path"]) for piece in pieces.users]
    assert got == [(i, f"block.attn.to_{i}") for i in range(3)]
    assert merged.meta["module_path"] == pieces.meta["module_path"] == "block.attn"
    assert merged.meta["row_layout"].size == next(iter(pieces.users)).meta["row_layout"].size
    report = done.reports["merge_linears"]
    assert [change.module_path for change in report.changes] == [f"block.attn.to_{i}" for i in range(3)]
    assert report.skipped == []
    assert_means_the_same(done, merge_linears)
    assert_every_step_means_the_same(done)


def test_the_weights_are_joined_once_a_model() -> None:
    done, _ = projections(True, True)
    stages = {node.meta["stage"] for node in done.final.graph.nodes if node.target is aten.cat.default}
    assert stages == {"constant"}


def test_layers_of_several_widths() -> None:
    build = HandBuilt()
    tokens = build.tokens(build.conv(build.latents()))
    narrow, wide = linear(build, tokens, 3, path="a.b"), linear(build, tokens, 5, path="c")
    parts = build.op(aten.cat.default, [narrow, wide], -1)
    done = snapshots(build.output(parts))
    assert only(done.after(merge_linears), aten.split_with_sizes.default).args[1] == [3, 5]
    assert reads(done)[0].meta["module_path"] == ""  # nothing is common to both paths
    assert_means_the_same(done, merge_linears)


def test_keys_and_values_of_all_cross_attentions_are_one_product_of_the_text() -> None:
    build = HandBuilt()
    sample, text = build.latents(), build.input("text", BATCH, TOKENS, CHANNELS)
    tokens = build.tokens(sample)
    for block in ("down", "up"):
        query = build.heads(linear(build, tokens, path=f"{block}.attn2.to_q"))
        key, value = (build.heads(linear(build, text, path=f"{block}.attn2.to_{name}")) for name in "kv")
        out = build.op(aten.scaled_dot_product_attention.default, query, key, value)
        tokens = build.tokens(build.unheads(out))
    done = snapshots(build.output(tokens))
    of_text = [node for node in reads(done) if node.args[0].target == "text"]
    assert len(of_text) == 1
    assert len(of_text[0].args[1].args[0]) == 4
    assert "row_layout" not in of_text[0].meta
    assert len(reads(done)) == 3  # and a query of each
    stages = {node.meta["stage"] for node in done.final.graph.nodes if node.target is aten.split_with_sizes.default}
    assert stages == {"prompt"}
    assert_means_the_same(done, merge_linears)
    assert_every_step_means_the_same(done)


def test_a_pointwise_convolution_is_joined_with_its_flattened_weight() -> None:
    build = HandBuilt()
    x = build.op(aten.silu.default, build.conv(build.latents()))
    both = [build.conv(x, kernel=1, path=path) for path in ("first", "second")]
    done = snapshots(build.output(total(build, both)))
    (merged,) = reads(done)
    flattened = merged.args[1].args[0]
    assert [part.target for part in flattened] == [aten.flatten.using_ints] * 2
    assert [part.args[0].target for part in flattened] == [conv.args[1].target for conv in both]
    assert_means_the_same(done, merge_linears)


def test_equal_activations_of_one_value_are_one_so_that_their_layers_are() -> None:
    """Each ResNet of SDXL applies its own SiLU to the embedding that the pooled text is part of."""
    build = HandBuilt()
    sample, embedding = build.latents(), build.input("pooled", BATCH, CHANNELS)
    x = build.conv(sample)
    for _ in range(2):
        projected = linear(build, build.op(aten.silu.default, embedding), bias=True, path="time_emb_proj")
        shift = build.op(aten.reshape.default, projected, [BATCH, CHANNELS, 1, 1])
        x = build.conv(build.op(aten.add.Tensor, x, shift))
    done = snapshots(build.output(x))
    assert targets_of(done.before(merge_linears)).count(aten.silu.default) == 2
    assert targets_of(done.after(merge_linears)).count(aten.silu.default) == 1
    assert len(reads(done)) == 1
    assert_means_the_same(done, merge_linears)


@pytest.mark.parametrize(
    ("first", "second", "left"),
    [
        ((aten.silu.default, (), {}), (aten.gelu.default, (), {}), 2),
        ((aten.clamp.default, (-1, 1), {}), (aten.clamp.default, (-1, 2), {}), 2),
        ((aten.clamp.default, (-1, 1), {}), (aten.clamp.default, (-1, 1), {}), 1),
        ((aten.gelu.default, (), {"approximate": "tanh"}), (aten.gelu.default, (), {"approximate": "tanh"}), 2),
    ],
    ids=["other operations", "other arguments", "equal arguments", "options are not compared"],
)
def test_which_activations_are_equal(first: tuple, second: tuple, left: int) -> None:
    build = HandBuilt()
    x = build.conv(build.latents())
    one, other = (build.op(op, x, *args, **kwargs) for op, args, kwargs in (first, second))
    done = snapshots(build.output(build.op(aten.sub.Tensor, one, other)))
    remaining = [target for target in targets_of(done.after(merge_linears)) if target in targets.UNARY]
    assert len(remaining) == left
    assert_means_the_same(done, merge_linears)


def test_skips_a_layer_that_alone_reads_its_value() -> None:
    done, _ = projections(True)
    assert aten.split_with_sizes.default not in targets_of(done.after(merge_linears))
    assert (done.reports["merge_linears"].changed, done.reports["merge_linears"].skipped) == (0, [])


def test_skips_layers_of_which_only_some_have_a_bias() -> None:
    done, _ = projections(True, False)
    assert len(reads(done)) == 2
    reason = "only some of the layers that read this value have a bias"
    assert done.skips("merge_linears") == [(f"block.attn.to_{i}", reason) for i in range(2)]
    assert_means_the_same(done, merge_linears)


def test_skips_layers_whose_weight_is_computed() -> None:
    build = HandBuilt()
    tokens = build.tokens(build.conv(build.latents()))
    scaled = build.op(aten.mul.Tensor, build.weight(CHANNELS, CHANNELS), 0.5)
    layers = [build.op(aten.linear.default, tokens, scaled, path="lora"), linear(build, tokens, path="plain")]
    done = snapshots(build.output(total(build, layers)))
    assert done.skips("merge_linears") == [(path, "its weight is computed") for path in ("lora", "plain")]
    assert_means_the_same(done, merge_linears)


def test_skips_layers_of_different_values() -> None:
    build = HandBuilt()
    tokens = build.tokens(build.conv(build.latents()))
    other = build.op(aten.silu.default, tokens)
    done = snapshots(build.output(total(build, [linear(build, tokens), linear(build, other)])))
    assert len(reads(done)) == 2
    assert_means_the_same(done, merge_linears)


def test_one_weight_that_two_layers_share() -> None:
    build = HandBuilt()
    tokens, weight = build.tokens(build.conv(build.latents())), build.weight(CHANNELS, CHANNELS)
    layers = [build.op(aten.linear.default, tokens, weight, path=path) for path in ("one", "two")]
    done = snapshots(build.output(total(build, layers)))
    assert len(reads(done)) == 1
    assert_means_the_same(done, merge_linears)
