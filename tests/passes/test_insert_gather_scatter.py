"""The pass that fixes what the sparse graph means: outside the mask every value of the region is the base's."""

from __future__ import annotations

import pytest
import torch
from support.hand_built import BATCH, CHANNELS, MASKS, SIZE, HandBuilt, aten, inputs, only, snapshots

from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, requests_of
from fisedit_compile.passes import targets
from fisedit_compile.passes.region.insert_gather_scatter import insert_gather_scatter
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def test_exact_rewriting_of_one_value() -> None:
    build = HandBuilt()
    sample = build.latents()
    silu = build.op(aten.silu.default, sample, path="act")
    done = snapshots(build.output(silu))
    graph_module = done.after(insert_gather_scatter)
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    assert [node.target for node in placeholders] == [
        "sample",
        "plan_index_6_5",
        "plan_count_6_5",
        "base_map_silu_default",
    ]
    assert requests_of(graph_module.graph) == [
        PlanTensor("index", SIZE),
        PlanTensor("count", SIZE),
        CacheEntry("silu_default", "map"),
    ]
    value, gather, scatter = (only(graph_module, op) for op in (silu.target, targets.GATHER_ROWS, targets.SCATTER_ROWS))
    _, index, count, base = placeholders
    assert gather.args == (value, index, [0, 2, 3, 1], 3)
    assert scatter.args == (gather, base, index, [BATCH, CHANNELS, *SIZE], [0, 2, 3, 1], 3)
    assert scatter.kwargs == {"count": count}
    assert graph_module.graph.output_node().args == (scatter,)
    assert value.users == {gather: None}
    assert scatter.meta["layout"] == gather.meta["row_layout"] == silu.meta["layout"]
    assert scatter.meta["module_path"] == gather.meta["module_path"] == "act"


def test_every_user_reads_the_scattered_value() -> None:
    build = HandBuilt()
    x = build.op(aten.silu.default, build.latents())
    y = build.op(aten.add.Tensor, x, x)
    done = snapshots(build.output(build.op(aten.mul.Tensor, y, x)))
    for node in done.after(insert_gather_scatter).graph.nodes:
        if node.op == "call_function" and node.target not in (targets.GATHER_ROWS, targets.SCATTER_ROWS):
            assert [user.target for user in node.users] == [targets.GATHER_ROWS]


def test_outside_the_mask_a_value_is_the_base_s_even_where_it_depends_on_active_pixels() -> None:
    build = HandBuilt()
    first = build.conv(build.latents())
    done = snapshots(build.output(build.conv(first)))
    (weight, bias), (weight2, bias2) = (
        [parameter.double() for parameter in pair] for pair in zip(*[iter(done.dense.parameters())] * 2, strict=True)
    )
    (base,), (edit,) = inputs(done.dense, 0), inputs(done.dense, 1)
    kept = done.record([base])
    for mask in MASKS.values():
        active = mask.expand(BATCH, -1, -1)[:, None]
        old, new = (torch.conv2d(x, weight, bias, padding=1) for x in (base, edit))
        between = torch.where(active, new, old)
        expected = [torch.conv2d(x, weight2, bias2, padding=1) for x in (old, between)]
        out = done.run(done.after(insert_gather_scatter), kept, [edit], mask)
        assert_close(out, torch.where(active, expected[1], expected[0]))


def test_tokens_and_heads_are_gathered_by_their_own_order() -> None:
    build = HandBuilt()
    heads = build.heads(build.tokens(build.latents()))
    done = snapshots(build.output(build.unheads(heads)))
    orders = {
        node.args[0].name: tuple(node.args[2])
        for node in done.after(insert_gather_scatter).graph.find_nodes(op="call_function", target=targets.GATHER_ROWS)
    }
    assert orders["reshape_default"] == (0, 1, 2)
    assert orders["view_default"] == (0, 1, 2, 3)
    assert orders["transpose_int"] == (0, 2, 1, 3)
