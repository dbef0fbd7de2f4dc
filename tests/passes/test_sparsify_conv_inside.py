"""Convolutions that read nothing of the base: the passes of a decoder."""

from __future__ import annotations

import pytest
import torch
from support.hand_built import (
    BATCH,
    MASKS,
    SIZE,
    HandBuilt,
    aten,
    copy_of,
    inputs,
    only,
    placeholders_of,
    targets_of,
)
from torch.fx import GraphModule

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, requests_of
from fisedit_compile.passes import targets
from fisedit_compile.passes.dense.record_activations import record_activations
from fisedit_compile.passes.manager import DECODER_PASSES, DECODER_PASSES_ON_HOST, SPARSE_PASSES, run_passes
from fisedit_compile.planning.edit_plan import plan_edit
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

#: The latents' level is computed whole, the one behind it by its mask.
WHOLE_BELOW = SparsityConfig(dense_below=min(SIZE) + 1)
LARGE = (2 * SIZE[0], 2 * SIZE[1])


def decoder() -> GraphModule:
    """Two convolutions on the latents' level, an upsampling, two with a norm and an activation behind it."""
    build = HandBuilt()
    x = build.op(aten.silu.default, build.conv(build.latents()))
    x = build.conv(build.op(aten.upsample_nearest2d.vec, build.conv(x), list(LARGE), None), path="up")
    x = build.op(aten.silu.default, build.op(aten.group_norm.default, x, 2, None, None, 1e-5))
    return build.output(build.conv(x, out=3, path="out"))


@pytest.fixture(scope="module")
def dense() -> GraphModule:
    return decoder()


@pytest.fixture(scope="module")
def sparse(dense: GraphModule) -> GraphModule:
    graph_module = copy_of(dense)
    run_passes(graph_module, WHOLE_BELOW, DECODER_PASSES)
    return graph_module


def run(
    dense: GraphModule, sparse: GraphModule, base: list[torch.Tensor], edit: list[torch.Tensor], mask: torch.Tensor
) -> torch.Tensor:
    requests = requests_of(sparse.graph)
    entries = [request for request in requests if isinstance(request, CacheEntry)]
    recorder = copy_of(dense)
    record_activations(recorder, entries, BATCH)
    kept = dict(zip(entries, recorder(*base)[1], strict=True))
    wanted = [request for request in requests if isinstance(request, PlanTensor)]
    plan = plan_edit(mask, wanted, batch=BATCH, dense_below=WHOLE_BELOW.dense_below)
    values = {**kept, **{request: plan.tensor(request) for request in wanted}, "sample": edit[0]}
    out: torch.Tensor = sparse(*(values[node.meta.get("request", node.target)] for node in placeholders_of(sparse)))
    return out


def test_it_takes_the_place_of_the_pass_with_a_halo() -> None:
    names = [each.__name__ for each in DECODER_PASSES]
    assert [each.removesuffix("_inside") for each in names] == [each.__name__ for each in SPARSE_PASSES]
    assert names != [each.__name__ for each in SPARSE_PASSES]


def test_on_the_host_the_whole_level_stays_as_it_is(dense: GraphModule, sparse: GraphModule) -> None:
    host = copy_of(dense)
    run_passes(host, WHOLE_BELOW, DECODER_PASSES_ON_HOST)
    assert targets_of(host).count(targets.CONV) == 2
    assert targets.CONV not in targets_of(sparse)
    assert PlanTensor("index", SIZE) not in requests_of(host.graph)
    base, edit = inputs(dense, 0), inputs(dense, 1)
    for mask in MASKS.values():
        assert_close(run(dense, host, base, edit, mask), run(dense, sparse, base, edit, mask))


def test_exact_rewriting(sparse: GraphModule) -> None:
    requests = requests_of(sparse.graph)
    assert not [each for each in requests if isinstance(each, PlanTensor) and each.kind == "halo"]
    kept = {(each.node, each.kind) for each in requests if isinstance(each, CacheEntry)}
    assert {kind for _, kind in kept} == {"map", "scale", "shift"}
    assert len([kind for _, kind in kept if kind == "map"]) == 1  # what the rows are scattered into at the end
    scatter = only(sparse, targets.SCATTER_ROWS)
    assert sparse.graph.output_node().args[0] is scatter
    tables = [each.where for each in requests if isinstance(each, PlanTensor) and each.kind == "table"]
    read_rows = {(taps.source, taps.target) for taps in tables if taps.inside}  # type: ignore[union-attr]
    assert read_rows == {(SIZE, SIZE), (SIZE, LARGE), (LARGE, LARGE)}
    assert [taps.source for taps in tables if taps.dense] == [SIZE]  # type: ignore[union-attr]


def test_unchanged_latents_give_the_base_wherever_all_is_there(dense: GraphModule, sparse: GraphModule) -> None:
    base = inputs(dense, 0)
    assert_close(run(dense, sparse, base, base, MASKS["all"]), dense(*base))


@pytest.mark.parametrize("name", MASKS)
def test_pixels_that_are_no_rows_are_the_base_s_bits(dense: GraphModule, sparse: GraphModule, name: str) -> None:
    base, edit = inputs(dense, 0), inputs(dense, 1)
    mask = MASKS[name]
    out = run(dense, sparse, base, edit, mask)
    pixels = mask.expand(BATCH, -1, -1).repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None].expand_as(out)
    recorded = run(dense, sparse, base, base, torch.zeros_like(mask))
    assert torch.equal(out[~pixels], recorded[~pixels])


def test_rows_away_from_the_rim_are_those_of_all_pixels(dense: GraphModule, sparse: GraphModule) -> None:
    base, edit = inputs(dense, 0), inputs(dense, 1)
    mask = torch.zeros(BATCH, *SIZE, dtype=torch.bool)
    mask[:, 1:5, 1:4] = True
    whole, part = (run(dense, sparse, base, edit, each) for each in (MASKS["all"], mask))
    assert_close(part[..., 3:9, 3:7], whole[..., 3:9, 3:7])
    assert not torch.equal(part[..., 2, 2], whole[..., 2, 2])
