"""Group norms on rows, with the statistics of the base; layer norms as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.hand_built import (
    BATCH,
    CHANNELS,
    MASKS,
    SIZE,
    HandBuilt,
    arguments,
    assert_every_step_means_the_same,
    aten,
    inputs,
    only,
    snapshots,
    targets_of,
)

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, requests_of
from fisedit_compile.passes import targets
from fisedit_compile.passes.sparsify.sparsify_norm import sparsify_norm
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("affine", ["both", "weight", "bias", "none"])
@pytest.mark.parametrize(("groups", "eps"), [(1, 1e-5), (2, 1e-6), (CHANNELS, 0.1)])
def test_the_base_s_statistics_with_fresh_values(affine: str, groups: int, eps: float) -> None:
    build = HandBuilt()
    weight, bias = (build.weight(CHANNELS) if affine in ("both", name) else None for name in ("weight", "bias"))
    # latents come first in a graph's inputs, weights are no inputs: their order is free
    done = snapshots(
        build.output(build.op(aten.group_norm.default, build.latents(), groups, weight, bias, eps, path="norm"))
    )
    (base,), (edit,) = inputs(done.dense, 0), inputs(done.dense, 1)
    grouped = base.view(BATCH, groups, -1)
    mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, correction=0, keepdim=True)
    expected = ((edit.view(BATCH, groups, -1) - mean) / (variance + eps).sqrt()).view_as(edit)
    for node, apply in ((weight, torch.mul), (bias, torch.add)):
        if node is not None:
            expected = apply(expected, node.meta["val"][:, None, None])
    for mask in MASKS.values():
        active = mask.expand(BATCH, -1, -1)[:, None]
        out = done.run(done.final, done.record([base]), [edit], mask)
        assert_close(out, torch.where(active, expected, done.dense(base)))
    assert_every_step_means_the_same(done, statistics=True)


def test_exact_rewriting() -> None:
    build = HandBuilt()
    x = build.op(aten.silu.default, build.latents())
    norm = build.op(aten.group_norm.default, x, 2, build.weight(CHANNELS), build.weight(CHANNELS), 1e-6, path="norm1")
    done = snapshots(build.output(norm))
    graph_module = done.after(sparsify_norm)
    rows, sample, scale, shift = only(graph_module, targets.GROUP_NORM_ROWS).args
    assert rows.target is targets.GATHER_ROWS
    assert sample.meta["request"] == PlanTensor("sample", SIZE)
    assert scale.meta["request"] == CacheEntry("group_norm_default", "scale")
    assert shift.meta["request"] == CacheEntry("group_norm_default", "shift")
    assert only(done.final, targets.GROUP_NORM_ROWS).meta["module_path"] == "norm1"
    assert done.reports["sparsify_norm"].changed == 1


@pytest.mark.parametrize("affine", [True, False])
def test_exact_rewriting_on_a_whole_level(affine: bool) -> None:
    """Every pixel is a row, so the norm takes its own statistics: as exact as the dense one, and nothing is kept."""
    build = HandBuilt()
    weights = [build.weight(CHANNELS), build.weight(CHANNELS)] if affine else [None, None]
    small = build.conv(build.latents(), stride=[2, 2])
    norm = build.op(aten.group_norm.default, small, 2, *weights, 1e-3, path="norm1")
    large = build.op(aten.upsample_nearest2d.vec, norm, list(SIZE), None)
    done = snapshots(build.output(build.conv(large)), SparsityConfig(dense_below=5))
    whole = only(done.after(sparsify_norm), targets.GROUP_NORM_WHOLE)
    weight, bias = (each and each.target for each in weights)
    given = {"rows": targets.GATHER_ROWS, "samples": BATCH, "groups": 2, "weight": weight, "bias": bias, "eps": 1e-3}
    assert arguments(whole) == given
    assert whole.meta["module_path"] == "norm1"
    assert {r.kind for r in requests_of(done.final.graph) if isinstance(r, CacheEntry)} == {"map"}
    assert_every_step_means_the_same(done)  # for changed inputs too: no statistics of the base


def test_its_input_s_map_is_not_kept() -> None:
    build = HandBuilt()
    x = build.conv(build.latents())
    norm = build.op(aten.group_norm.default, x, 2)
    done = snapshots(build.output(norm))
    kept = [node.meta["request"] for node in done.final.graph.nodes if "request" in node.meta]
    assert [r for r in kept if isinstance(r, CacheEntry) and r.kind == "map"] == [CacheEntry(norm.name, "map")]


def test_keyword_arguments_are_left_dense_and_reported() -> None:
    """torch.export gives positional ones."""
    build = HandBuilt()
    affine: dict[str, Any] = {"weight": build.weight(CHANNELS), "bias": build.weight(CHANNELS), "eps": 0.1}
    x = build.conv(build.latents())
    done = snapshots(build.output(build.op(aten.group_norm.default, x, 2, path="odd", **affine)))
    assert ("odd", "a group norm with keyword arguments has no row kernel") in done.skips()
    assert_every_step_means_the_same(done)


def test_a_group_norm_of_tokens() -> None:
    """As in the attention of decoders."""
    build = HandBuilt()
    tokens = build.op(aten.transpose.int, build.tokens(build.conv(build.latents())), 1, 2)  # [B, C, S]
    norm = build.op(aten.group_norm.default, tokens, 2, build.weight(CHANNELS), None, 1e-5, path="norm")
    done = snapshots(build.output(build.op(aten.reshape.default, norm, [BATCH, CHANNELS, *SIZE])))
    assert targets.GROUP_NORM not in targets_of(done.final)
    assert_every_step_means_the_same(done, statistics=True)


def test_a_group_norm_whose_channels_lie_last_is_left_dense_and_reported() -> None:
    build = HandBuilt()
    tokens = build.tokens(build.conv(build.latents()))  # [B, S, C]
    done = snapshots(build.output(build.op(aten.group_norm.default, tokens, 2, path="odd")))
    assert ("odd", "a group norm of a value that is neither [B, C, H, W] nor [B, C, H*W]") in done.skips()
    assert targets.GROUP_NORM in targets_of(done.final)
    assert_every_step_means_the_same(done)


@pytest.mark.parametrize("shape", [[CHANNELS // 2], [2, CHANNELS // 2]])
def test_layer_norm_sees_one_row_at_a_time(shape: list[int]) -> None:
    build = HandBuilt()
    tokens = build.tokens(build.conv(build.latents()))
    split = build.op(aten.view.default, tokens, [BATCH, -1, 2, CHANNELS // 2])
    norm = build.op(aten.layer_norm.default, split, shape, build.weight(*shape), build.weight(*shape), 1e-3)
    done = snapshots(build.output(build.op(aten.view.default, norm, [BATCH, -1, CHANNELS])))
    assert done.skips() == []
    assert only(done.final, targets.LAYER_NORM).args[1] == shape
    assert_every_step_means_the_same(done)
