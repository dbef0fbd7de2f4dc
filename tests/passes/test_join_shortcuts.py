"""A ResNet's 1x1 shortcut becomes more depth of the convolution that it is added to, and what must be left as it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from support.fused import COUNT, SAMPLE, embedding, epilogue, norm, normed_and_raw, silu
from support.hand_built import (
    CHANNELS,
    SIZE,
    HandBuilt,
    Snapshots,
    arguments,
    assert_every_step_means_the_same,
    assert_means_the_same,
    aten,
    only,
    snapshots,
    targets_of,
)
from torch.fx import Node

from fisedit_compile.config import SparsityConfig
from fisedit_compile.passes import targets
from fisedit_compile.passes.fusion.join_shortcuts import join_shortcuts
from fisedit_compile.passes.row_product import RowProduct

pytestmark = pytest.mark.usefixtures("one_thread")

#: Channels of the value that the shortcut reads, and what its weight is.
WIDE = 6
FLAT = aten.flatten.using_ints
#: What a convolution takes in: the rows that the shortcut reads, made by a convolution, and its weight.
SHORTCUT = {"shortcut": targets.CONV2D_ROWS, "shortcut_weight": FLAT}


def resnet(
    then: Callable[[HandBuilt, Node], Node] = lambda build, total: total,
    behind: Callable[[HandBuilt, Node], Node] = lambda build, shortcut: shortcut,
    *,
    conv_first: bool = True,
    bias: tuple[bool, bool] = (True, True),
) -> Snapshots:
    """The second half of a ResNet, its input that of the shortcut: what is behind the shortcut, and behind the sum."""
    build = HandBuilt()
    x = build.conv(build.latents(), WIDE, path="in")
    h = product(build, build.op(aten.tanh.default, x), 3, bias[0], path="resnet.conv2")
    shortcut = behind(build, product(build, x, 1, bias[1], path="resnet.conv_shortcut"))
    both = (h, shortcut) if conv_first else (shortcut, h)
    return snapshots(build.output(then(build, build.op(aten.add.Tensor, *both, path="resnet"))))


def product(build: HandBuilt, x: Node, kernel: int, bias: bool, path: str) -> Node:
    weight = build.weight(CHANNELS, x.meta["val"].shape[1], kernel, kernel)
    geometry = [1, 1], [kernel // 2] * 2, [1, 1], 1
    return build.op(aten.conv2d.default, x, weight, build.weight(CHANNELS) if bias else None, *geometry, path=path)


def convolution(done: Snapshots) -> Node:
    """The second convolution, after the pass."""
    graph = done.after(join_shortcuts).graph
    return [node for node in graph.nodes if node.target in (targets.CONV2D_ROWS, targets.CONV2D_ROWS_AND_NORM)][1]


def assert_left(done: Snapshots, *reasons: str) -> None:
    """The pass changes nothing, and reports the shortcut for these reasons."""
    assert targets_of(done.after(join_shortcuts)) == targets_of(done.before(join_shortcuts))
    assert done.reports["join_shortcuts"].changes == []
    assert done.skips("join_shortcuts") == [("resnet.conv_shortcut", reason) for reason in reasons]
    assert_means_the_same(done, join_shortcuts)


@pytest.mark.parametrize("conv_first", [True, False])
def test_exact_rewriting(conv_first: bool) -> None:
    done = resnet(conv_first=conv_first)
    before = only(done.before(join_shortcuts), targets.LINEAR_ROWS)
    (old,) = before.users
    conv = convolution(done)
    assert conv.target is targets.CONV2D_ROWS
    new, conv_before, shortcut = RowProduct(conv), RowProduct(old), RowProduct(before)
    bias = new["bias"]
    assert bias.target is aten.add.Tensor
    assert [part.name for part in bias.args] == [conv_before["bias"].name, shortcut["bias"].name]
    table = arguments(old)["table"]
    assert list(arguments(conv).items())[4:] == [("table", table), ("count", COUNT), *SHORTCUT.items()]
    assert [new[name].name for name in ("rows", "halo", "weight")] == [
        conv_before[name].name for name in ("rows", "halo", "weight")
    ]
    assert new["shortcut"].name == shortcut["rows"].name
    assert new["shortcut_weight"].name == shortcut["weight"].name
    assert new["shortcut"].meta["module_path"] == "in"
    assert conv.meta["row_layout"].size == SIZE
    assert targets.LINEAR_ROWS not in targets_of(done.after(join_shortcuts))
    report = done.reports["join_shortcuts"]
    assert [(change.module_path, change.op) for change in report.changes] == [
        ("resnet.conv_shortcut", "fisedit.linear_rows.default")
    ]
    assert report.skipped == []
    assert_means_the_same(done, join_shortcuts)
    assert_every_step_means_the_same(done)


@pytest.mark.parametrize("bias", [(True, True), (True, False), (False, True), (False, False)])
def test_the_bias_is_the_sum_of_those_that_there_are(bias: tuple[bool, bool]) -> None:
    done = resnet(bias=bias)
    old = only(done.before(join_shortcuts), targets.LINEAR_ROWS)
    biases = [RowProduct(node)["bias"] for node in (next(iter(old.users)), old)]
    given = [part.name for part in biases if part is not None]
    joined = RowProduct(convolution(done))["bias"]
    if sum(bias) == 2:
        assert (joined.target, [part.name for part in joined.args]) == (aten.add.Tensor, given)
    else:
        assert ([] if joined is None else [joined.name]) == given
    assert len(given) == sum(bias)
    assert_means_the_same(done, join_shortcuts)


def test_the_module_is_that_of_both_and_biases_are_added_once_a_model() -> None:
    done = resnet()
    conv = convolution(done)
    assert [node.meta["module_path"] for node in (conv, RowProduct(conv)["bias"])] == ["resnet"] * 2
    joined = only(done.final, aten.add.Tensor)
    assert (joined.meta["module_path"], joined.meta["stage"]) == ("resnet", "constant")


def test_a_norm_that_is_not_the_only_reader_comes_behind_both() -> None:
    done = resnet(normed_and_raw)
    conv = convolution(done)
    assert conv.target is targets.CONV2D_ROWS_AND_NORM
    given = epilogue(conv)
    assert [given.pop(name).kind for name in ("scale", "shift")] == ["scale", "shift"]
    assert given == {"count": COUNT, "sample": SAMPLE, "activation": "silu", **SHORTCUT}
    assert sorted(user.args[1] for user in conv.users) == [0, 1]
    assert_means_the_same(done, join_shortcuts)


@pytest.mark.parametrize("activation", [True, False])
def test_a_norm_that_alone_reads_the_sum_comes_behind_both(activation: bool) -> None:
    done = resnet(lambda build, x: silu(build, norm(build, x)) if activation else norm(build, x))
    conv = convolution(done)
    assert conv.target is targets.CONV2D_ROWS
    given = epilogue(conv)
    assert {"sample_bias", "residual"}.isdisjoint(given)
    assert (given["count"], given["sample"], given.get("activation", "none")) == (
        COUNT,
        SAMPLE,
        "silu" if activation else "none",
    )
    assert given | SHORTCUT == given
    assert_means_the_same(done, join_shortcuts)


def test_an_embedding_stays_in_the_convolution() -> None:
    done = resnet(lambda build, x: build.op(aten.add.Tensor, x, embedding(build)))
    conv = convolution(done)
    of_sample = {"sample": SAMPLE, "sample_bias": aten.reshape.default}
    assert epilogue(conv) == {"count": COUNT, **of_sample, **SHORTCUT}
    assert_means_the_same(done, join_shortcuts)


def test_a_linear_layer_of_tokens_is_joined_as_well() -> None:
    build = HandBuilt()
    x = build.op(aten.tanh.default, build.latents())
    tokens = build.tokens(build.conv(x, path="net.conv"))
    weights = build.weight(CHANNELS, CHANNELS), build.weight(CHANNELS)
    other = build.op(aten.linear.default, build.tokens(build.op(aten.neg.default, x)), *weights, path="net.linear")
    done = snapshots(build.output(build.op(aten.add.Tensor, tokens, other)))
    assert arguments(only(done.after(join_shortcuts), targets.CONV2D_ROWS))["shortcut"] is aten.neg.default
    assert_means_the_same(done, join_shortcuts)


def test_a_whole_level_has_no_count() -> None:
    build = HandBuilt()
    small = build.conv(build.latents(), stride=[2, 2])
    both = build.conv(small, path="mid.conv2"), build.conv(small, kernel=1, path="mid.conv_shortcut")
    small = build.op(aten.add.Tensor, *both)
    large = build.op(aten.upsample_nearest2d.vec, small, list(SIZE), None)
    done = snapshots(build.output(build.conv(large, path="up")), SparsityConfig(dense_below=5))
    conv = convolution(done)
    assert conv.meta["module_path"] == "mid"
    assert epilogue(conv) == SHORTCUT
    assert_means_the_same(done, join_shortcuts)


def test_each_resnet_takes_its_own() -> None:
    build = HandBuilt()
    x = build.latents()
    for path in ("first", "second"):
        h = build.conv(build.op(aten.tanh.default, x), path=f"{path}.conv2")
        x = build.op(aten.add.Tensor, h, build.conv(x, kernel=1, path=f"{path}.conv_shortcut"), path=path)
    done = snapshots(build.output(x))
    convs = done.after(join_shortcuts).graph.find_nodes(op="call_function", target=targets.CONV2D_ROWS)
    assert [(conv.meta["module_path"], arguments(conv)["shortcut"]) for conv in convs] == [
        ("first", targets.GATHER_ROWS),
        ("second", targets.CONV2D_ROWS),
    ]
    assert RowProduct(convs[1])["shortcut"] is convs[0]
    assert_means_the_same(done, join_shortcuts)
    assert_every_step_means_the_same(done)


def test_skips_a_shortcut_that_is_read_elsewhere() -> None:
    build = HandBuilt()
    x = build.op(aten.tanh.default, build.latents())
    conv, shortcut = build.conv(x, path="resnet.conv2"), build.conv(x, kernel=1, path="resnet.conv_shortcut")
    total = build.op(aten.add.Tensor, conv, shortcut)
    done = snapshots(build.output(build.op(aten.mul.Tensor, total, shortcut)))
    assert_left(done, "its result is read elsewhere, too")
    assert epilogue(only(done.after(join_shortcuts), targets.CONV2D_ROWS))["residual"] is targets.LINEAR_ROWS


@pytest.mark.parametrize(
    "behind",
    [silu, norm, lambda build, x: build.op(aten.add.Tensor, x, embedding(build))],
    ids=["silu", "norm", "embedding"],
)
def test_skips_a_shortcut_with_something_behind_it(behind: Callable[[HandBuilt, Node], Node]) -> None:
    done = resnet(behind=behind)
    assert_left(done, "something follows it before the sum")
    assert epilogue(convolution(done))["residual"] is targets.LINEAR_ROWS


@pytest.mark.parametrize(
    ("behind", "residual"),
    [
        (lambda build, x: build.op(aten.neg.default, x), aten.neg.default),
        (lambda build, x: build.conv(x, path="other"), targets.CONV2D_ROWS),
    ],
    ids=["activation", "convolution"],
)
def test_skips_a_residual_that_is_no_linear_layer(behind: Callable[[HandBuilt, Node], Node], residual: object) -> None:
    done = resnet(behind=behind)
    assert_left(done)
    convs = done.after(join_shortcuts).graph.find_nodes(op="call_function", target=targets.CONV2D_ROWS)
    assert residual in [epilogue(conv).get("residual") for conv in convs]


def test_skips_a_convolution_without_a_residual_and_a_linear_layer_with_one() -> None:
    build = HandBuilt()
    x = build.op(aten.tanh.default, build.conv(build.latents(), path="in"))
    out = build.op(aten.add.Tensor, build.conv(x, kernel=1, path="resnet.linear"), x)
    assert_left(snapshots(build.output(out)))
