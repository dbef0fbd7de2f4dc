"""Which values become rows: by resolution, and upsampled maps only where nobody reads them but convolutions."""

from __future__ import annotations

import pytest
from hand_built import CONFIG, MASKS, SIZE, HandBuilt, assert_every_step_means_the_same, aten, inputs, only, snapshots
from torch.fx import GraphModule

from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import SparsifyError
from fisedit_compile.passes import ops
from fisedit_compile.passes.select_region import select_region
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


@pytest.mark.parametrize(
    ("dense_below", "chosen"),
    [(1, ["in", "down", "mid", "out"]), (3, ["in", "down", "mid", "out"]), (4, ["in", "out"]), (5, ["in", "out"])],
)
def test_the_shorter_side_decides(dense_below: int, chosen: list[str]) -> None:
    graph_module = down_and_up()
    report = select_region(graph_module, SparsityConfig(dense_below=dense_below))
    assert region(graph_module) == chosen
    assert report.changed == len(chosen)
    left = [(skip.module_path, skip.reason) for skip in report.skipped]
    reason = f"resolution 3x3 is below dense_below={dense_below}"
    assert left == [(path, reason) for path in ("down", "mid") if path not in chosen]


@pytest.mark.parametrize("dense_below", [1, 4])
def test_both_mean_the_same(dense_below: int) -> None:
    assert_every_step_means_the_same(snapshots(down_and_up(), SparsityConfig(dense_below=dense_below)))


def test_nothing_at_that_resolution_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(SparsifyError, match=r"runs at 6 or more latent cells a side; lower dense_below, or edit a"):
        select_region(down_and_up(), SparsityConfig(dense_below=6))


def test_an_upsampled_map_is_never_made_for_convolutions() -> None:
    done = snapshots(down_and_up())
    assert done.skips() == []
    assert not done.final.graph.find_nodes(op="call_function", target=ops.UPSAMPLE)


def test_an_upsampled_map_that_something_else_reads_is_dense_and_reported() -> None:
    build = HandBuilt()
    small = build.conv(build.latents(), stride=[2, 2])
    large = build.op(aten.upsample_nearest2d.vec, small, list(SIZE), None, path="up")
    read_twice = build.op(aten.add.Tensor, build.conv(large, path="conv"), large, path="sum")
    done = snapshots(build.output(read_twice))
    assert done.skips() == [("up", "its map is used by more than convolutions, so it is computed dense")]
    assert only(done.final, ops.UPSAMPLE).meta["module_path"] == "up"
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
