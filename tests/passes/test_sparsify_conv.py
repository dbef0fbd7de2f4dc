"""Convolutions on rows: stride, dilation, upsampling and padding in the table, the halo from the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.hand_built import (
    CHANNELS,
    MASKS,
    SIZE,
    HandBuilt,
    Snapshots,
    assert_every_step_means_the_same,
    aten,
    only,
    snapshots,
    targets_of,
)

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, requests_of
from fisedit_compile.ir.taps import Taps
from fisedit_compile.passes import targets
from fisedit_compile.passes.region.cancel_scatter_gather import cancel_scatter_gather
from fisedit_compile.passes.row_product import RowProduct
from fisedit_compile.passes.sparsify.sparsify_conv import sparsify_conv
from fisedit_compile.planning.edit_plan import plan_edit

pytestmark = pytest.mark.usefixtures("one_thread")

ONE, THREE = (1, 1), (3, 3)


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"kernel": 1},
        {"stride": [2, 2]},
        {"stride": [2, 1]},
        {"dilation": [2, 2], "padding": [2, 2]},
        {"padding": [0, 0]},
        {"padding": [2, 1]},
        {"kernel": 1, "stride": [2, 2]},
        {"kernel": 1, "padding": [1, 1]},
        {"kernel": 5, "stride": [3, 3]},
        {"out": 7},
        {"stride": [2], "padding": [1]},
    ],
    ids=str,
)
@pytest.mark.parametrize("upsampled", [None, (12, 10), (11, 9), (7, 5)], ids=str)
def test_any_geometry_behind_a_value_of_the_region(geometry: dict[str, Any], upsampled: tuple[int, int] | None) -> None:
    build = HandBuilt()
    x = build.conv(build.latents())
    if upsampled:
        x = build.op(aten.upsample_nearest2d.vec, x, list(upsampled), None)
    done = snapshots(build.output(build.conv(x, **geometry)))
    assert done.reports["sparsify_conv"].changed == 2
    assert targets.CONV not in targets_of(done.final)
    assert_every_step_means_the_same(done)


def test_exact_rewriting_of_a_strided_convolution() -> None:
    build = HandBuilt()
    first = build.op(aten.silu.default, build.latents())
    conv = build.conv(first, out=7, stride=[2, 2], path="down")
    done = snapshots(build.output(conv))
    graph_module = done.after(sparsify_conv)
    taps = Taps(SIZE, (3, 3), kernel=THREE, stride=(2, 2), padding=ONE, dilation=ONE)
    rows = only(graph_module, targets.CONV2D_ROWS)
    source, halo, weight, bias, table = rows.args
    assert source.target is targets.GATHER_ROWS
    assert source.args[0].target is targets.SCATTER_ROWS  # cancels later
    assert halo.target is aten.index_select.default
    base_map, dim, halo_index = halo.args
    assert base_map.meta["request"] == CacheEntry("silu_default", "map")
    assert (dim, halo_index.meta["request"]) == (0, PlanTensor("halo", taps))
    assert table.meta["request"] == PlanTensor("table", taps)
    assert weight.target is aten.flatten.using_ints
    assert weight.args[0].args == (conv_weight(graph_module, conv), [0, 2, 3, 1])
    assert weight.args[1:] == (1,)
    assert bias.target == conv.args[2].target
    assert rows.meta["module_path"] == "down"
    assert targets.CONV not in {user.target for user in rows.users}


def conv_weight(graph_module: torch.fx.GraphModule, conv: torch.fx.Node) -> torch.fx.Node:
    (weight,) = (node for node in graph_module.graph.nodes if node.op == "get_attr" and node.name == conv.args[1].name)
    return weight


def test_exact_rewriting_of_a_convolution_of_the_latents() -> None:
    build = HandBuilt()
    done = snapshots(build.output(build.conv(build.latents())))
    taps = Taps(SIZE, SIZE, kernel=THREE, stride=ONE, padding=ONE, dilation=ONE, dense=True)
    product = RowProduct(only(done.final, targets.CONV2D_ROWS))
    pixels = product["rows"]
    assert product["halo"] is None
    assert pixels.target is aten.flatten.using_ints
    assert pixels.args[1:] == (0, 2)
    assert pixels.args[0].args[1] == [0, 2, 3, 1]
    assert product["table"].meta["request"] == PlanTensor("table", taps)
    assert product["count"].meta["request"] == PlanTensor("count", SIZE)
    assert not [r for r in requests_of(done.final.graph) if isinstance(r, PlanTensor) and r.kind == "halo"]


def test_exact_rewriting_behind_an_upsampled_map() -> None:
    build = HandBuilt()
    small = build.conv(build.latents(), stride=[2, 2])
    large = build.op(aten.upsample_nearest2d.vec, small, list(SIZE), None)
    done = snapshots(build.output(build.conv(large, path="out")))
    (rows,) = (
        node
        for node in done.final.graph.find_nodes(op="call_function", target=targets.CONV2D_ROWS)
        if node.meta["module_path"] == "out"
    )
    taps = Taps((3, 3), SIZE, kernel=THREE, stride=ONE, padding=ONE, dilation=ONE, upsampled=SIZE)
    product = RowProduct(rows)
    assert product["table"].meta["request"] == PlanTensor("table", taps)
    assert product["halo"].args[2].meta["request"] == PlanTensor("halo", taps)
    assert product["halo"].args[0].meta["request"] == CacheEntry("conv2d_default", "map")


def test_a_pointwise_convolution_is_a_linear_layer_and_keeps_no_map() -> None:
    build = HandBuilt()
    silu = build.op(aten.silu.default, build.latents())
    done = snapshots(build.output(build.conv(silu, out=7, kernel=1, path="proj")))
    linear = only(done.after(cancel_scatter_gather), targets.LINEAR)
    assert linear.args[0].target is aten.silu.default
    assert linear.args[1].target is aten.flatten.using_ints
    assert linear.args[1].args[1:] == (1,)
    assert linear.meta["module_path"] == "proj"
    kept = [request for request in requests_of(done.final.graph) if isinstance(request, CacheEntry)]
    assert kept == [CacheEntry("conv2d_default", "map")]  # the output's, to scatter into


def test_without_a_bias_and_without_optional_arguments() -> None:
    build = HandBuilt()
    x = build.op(aten.silu.default, build.latents())
    done = snapshots(build.output(build.op(aten.conv2d.default, x, build.weight(CHANNELS, CHANNELS, 3, 3))))
    assert RowProduct(only(done.final, targets.CONV2D_ROWS))["bias"] is None
    assert_every_step_means_the_same(done)


def test_convolutions_of_one_geometry_share_their_table() -> None:
    build = HandBuilt()
    x = build.conv(build.conv(build.conv(build.latents())))
    done = snapshots(build.output(build.conv(x)))
    kinds = [request.kind for request in requests_of(done.final.graph) if isinstance(request, PlanTensor)]
    assert sorted(kinds) == ["count", "halo", "index", "table", "table"]  # one of the latents, one of the rows


class TestWholeLevels:
    """Below ``dense_below`` every pixel is a row: no halo, and nothing scattered on the way down and up."""

    BELOW = SparsityConfig(dense_below=5)

    @staticmethod
    def bottleneck(*geometries: dict[str, Any]) -> Snapshots:
        build = HandBuilt()
        small = build.conv(build.conv(build.latents()), stride=[2, 2], path="down")
        branches = [build.conv(small, path=f"branch{i}", **given) for i, given in enumerate(geometries)]
        total = branches[0]
        for branch in branches[1:]:
            total = build.op(aten.add.Tensor, total, branch)
        large = build.op(aten.upsample_nearest2d.vec, total, list(SIZE), None)
        return snapshots(build.output(build.conv(large, path="up")), TestWholeLevels.BELOW)

    def test_exact_rewriting(self) -> None:
        done = self.bottleneck({})
        products = {
            node.meta["module_path"]: RowProduct(node)
            for node in done.final.graph.find_nodes(op="call_function", target=targets.CONV2D_ROWS)
        }
        small: dict[str, Any] = {"kernel": THREE, "padding": ONE, "dilation": ONE}
        down = Taps(SIZE, (3, 3), stride=(2, 2), **small)
        within = Taps((3, 3), (3, 3), stride=ONE, **small)
        up = Taps((3, 3), SIZE, stride=ONE, upsampled=SIZE, **small)
        # On the way down the region above still has a mask, so the halo is the base's.
        assert products["down"]["halo"].args[2].meta["request"] == PlanTensor("halo", down)
        for path, taps in (("branch0", within), ("up", up)):
            assert products[path]["rows"].target is targets.CONV2D_ROWS
            assert products[path]["halo"] is None
            assert products[path]["table"].meta["request"] == PlanTensor("table", taps)
        # Only rows that a mask decides have a count; the two below have none.
        assert [products[path]["count"] for path in ("down", "branch0")] == [None, None]
        assert products["up"]["count"].meta["request"] == PlanTensor("count", SIZE)

    def test_no_map_of_the_level_is_kept_and_none_is_made(self) -> None:
        done = self.bottleneck({}, {"kernel": 1})
        kept = {r.node for r in requests_of(done.final.graph) if isinstance(r, CacheEntry)}
        sizes = {node.name: node.meta["layout"].size for node in done.dense.graph.nodes if node.name in kept}
        assert set(sizes.values()) == {SIZE}
        assert targets_of(done.final).count(targets.SCATTER_ROWS) == 1
        assert not done.final.graph.find_nodes(op="call_function", target=targets.CONV)
        assert_every_step_means_the_same(done)

    def test_two_of_one_size_and_another_dilation_do_not_share_a_table(self) -> None:
        done = self.bottleneck({}, {"dilation": [2, 2], "padding": [2, 2]})
        tables = [r for r in requests_of(done.final.graph) if isinstance(r, PlanTensor) and r.kind == "table"]
        assert len(tables) == len(set(tables)) == 5
        assert_every_step_means_the_same(done)

    def test_an_empty_mask_still_computes_the_level(self) -> None:
        done = self.bottleneck({})
        requests = [request for request in requests_of(done.final.graph) if isinstance(request, PlanTensor)]
        plan = plan_edit(MASKS["none"], requests, batch=2, dense_below=5)
        assert plan.counts == {SIZE: 0, (3, 3): 18}
        halo = Taps(SIZE, (3, 3), kernel=THREE, stride=(2, 2), padding=ONE, dilation=ONE)
        assert len(plan.tensor(PlanTensor("halo", halo))) == 60  # all that the level reads is the base's

    def test_a_grouped_convolution_between_is_dense_and_the_region_starts_anew(self) -> None:
        done = self.bottleneck({"groups": 2}, {})
        assert targets_of(done.final).count(targets.CONV) == 1
        assert [path for path, _ in done.skips("annotate_layout")] == ["branch0"]
        assert_every_step_means_the_same(done)


def test_an_empty_mask_leaves_no_row_and_a_full_one_no_halo() -> None:
    build = HandBuilt()
    done = snapshots(build.output(build.conv(build.conv(build.latents()))))
    requests = [request for request in requests_of(done.final.graph) if isinstance(request, PlanTensor)]
    for name, rows, halos in (("none", 0, 0), ("all", 60, 0)):
        plan = plan_edit(MASKS[name], requests, batch=2)
        counts = {request.kind: len(plan.tensor(request)) for request in requests if request.kind != "count"}
        assert counts == {"index": rows, "table": rows, "halo": halos}
