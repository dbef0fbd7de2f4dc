"""Which values become rows: by resolution, and upsampled maps only where nobody reads them but convolutions."""

from __future__ import annotations

import pytest
from support.hand_built import (
    CONFIG,
    MASKS,
    SIZE,
    HandBuilt,
    assert_every_step_means_the_same,
    aten,
    copy_of,
    inputs,
    only,
    snapshots,
    targets_of,
)
from torch.fx import GraphModule

from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import SparsifyError
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import requests_of
from fisedit_compile.passes import targets
from fisedit_compile.passes.region.insert_gather_scatter import insert_gather_scatter
from fisedit_compile.passes.region.select_region import select_region
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")


def down_and_up() -> GraphModule:
    """6x5 -> 3x3 -> 6x5, as a U-Net goes."""
    build = HandBuilt()
    small = build.conv(build.conv(build.latents(), path="in"), stride=[2, 2], path="down")
    small = build.op(aten.silu.default, small, path="mid")
    large = build.op(aten.upsample_nearest2d.vec, small, list(SIZE), None, path="up")
    return build.output(build.conv(large, path="out"))


def region(graph_module: GraphModule) -> list[str]:
    return [node.meta["module_path"] for node in graph_module.graph.nodes if node.meta.get("region")]


@pytest.mark.parametrize(("dense_below", "whole"), [(1, []), (3, []), (4, ["down", "mid"]), (5, ["down", "mid"])])
def test_the_shorter_side_decides_which_pixels_are_rows(dense_below: int, whole: list[str]) -> None:
    graph_module = down_and_up()
    report = select_region(graph_module, SparsityConfig(dense_below=dense_below))
    assert region(graph_module) == ["in", "down", "mid", "out"]
    assert [change.module_path for change in report.changes] == [
        path for path in ("in", "down", "mid", "out") if path not in whole
    ]
    left = [(skip.module_path, skip.reason) for skip in report.skipped]
    assert left == [(path, f"resolution 3x3 is below dense_below={dense_below}") for path in whole]


def test_a_whole_level_is_rows_without_a_gather_or_a_scatter_of_its_own() -> None:
    done = snapshots(down_and_up(), SparsityConfig(dense_below=4))
    operations = targets_of(done.final)
    assert operations.count(targets.CONV2D_ROWS) == 3
    assert targets.GATHER_ROWS not in operations
    assert operations.count(targets.SCATTER_ROWS) == 1
    kinds = [(r.kind, r.where) for r in requests_of(done.final.graph) if isinstance(r, PlanTensor)]
    assert ("index", (3, 3)) not in kinds
    assert ("count", (3, 3)) not in kinds


@pytest.mark.parametrize(("dense_below", "computed"), [(1, [(1, 1)]), (4, [(1, 1), (2, 1)])])
def test_a_whole_level_is_computed_beyond_the_mask_too(dense_below: int, computed: list[tuple[int, int]]) -> None:
    """Pixel (3, 2) of sample 1 is read by two pixels of the level below; one of them lies under the mask."""
    done = snapshots(down_and_up(), SparsityConfig(dense_below=dense_below))
    kept, edit = done.record(inputs(done.dense, 0)), inputs(done.dense, 1)
    graph_module = copy_of(done.after(insert_gather_scatter))
    *_, scattered = (node for node in graph_module.graph.nodes if node.meta.get("module_path") == "mid")
    assert scattered.target is targets.SCATTER_ROWS
    graph_module.graph.output_node().args = (scattered,)
    graph_module.recompile()
    base = done.run(graph_module, kept, edit, MASKS["none"])
    changed = (done.run(graph_module, kept, edit, MASKS["one pixel"]) - base).abs().amax(1) > 1e-9
    assert changed.nonzero().tolist() == [[1, *pixel] for pixel in computed]


@pytest.mark.parametrize("dense_below", [1, 4])
def test_both_mean_the_same(dense_below: int) -> None:
    assert_every_step_means_the_same(snapshots(down_and_up(), SparsityConfig(dense_below=dense_below)))


def test_nothing_at_that_resolution_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(SparsifyError, match=r"runs at 6 or more latent cells a side; lower dense_below, or edit a"):
        select_region(down_and_up(), SparsityConfig(dense_below=6))


def test_an_upsampled_map_is_never_made_for_convolutions() -> None:
    done = snapshots(down_and_up())
    assert done.skips() == []
    assert not done.final.graph.find_nodes(op="call_function", target=targets.UPSAMPLE)


def test_an_upsampled_map_that_something_else_reads_is_dense_and_reported() -> None:
    build = HandBuilt()
    small = build.conv(build.latents(), stride=[2, 2])
    large = build.op(aten.upsample_nearest2d.vec, small, list(SIZE), None, path="up")
    read_twice = build.op(aten.add.Tensor, build.conv(large, path="conv"), large, path="sum")
    done = snapshots(build.output(read_twice))
    assert done.skips() == [("up", "its map is used by more than convolutions, so it is computed dense")]
    assert only(done.final, targets.UPSAMPLE).meta["module_path"] == "up"
    assert_every_step_means_the_same(done)


def test_an_upsampled_map_for_a_convolution_without_a_row_form_is_dense_and_reported() -> None:
    build = HandBuilt()
    small = build.conv(build.latents(), stride=[2, 2])
    large = build.op(aten.upsample_nearest2d.vec, small, list(SIZE), None, path="up")
    done = snapshots(build.output(build.conv(large, groups=2, path="grouped")))
    assert [path for path, _ in done.skips()] == ["grouped", "up"]
    assert_every_step_means_the_same(done)


def test_an_upsampled_map_that_is_upsampled_again() -> None:
    build = HandBuilt()
    x = build.conv(build.latents())
    for path in ("up1", "up2"):
        x = build.op(aten.upsample_nearest2d.vec, x, None, [2.0, 2.0], path=path)
    done = snapshots(build.output(build.conv(x, path="conv")))
    assert done.skips() == [("up1", "its map is used by more than convolutions, so it is computed dense")]
    assert_every_step_means_the_same(done)


def test_a_scale_that_is_no_whole_number_reads_what_torch_reads() -> None:
    build = HandBuilt()
    x = build.conv(build.latents())
    x = build.op(aten.upsample_nearest2d.vec, x, None, [2.3, 2.3], path="up")
    done = snapshots(build.output(build.conv(x)))
    assert_close(done.run_final(0, 0, MASKS["all"]), done.dense(*inputs(done.dense, 0)))


def test_latents_themselves_are_never_in_the_region() -> None:
    build = HandBuilt()
    sample = build.latents()
    graph_module = build.output(build.conv(sample))
    select_region(graph_module, CONFIG)
    assert "region" not in sample.meta
