"""Group norms whose statistics follow the edit, in the graph for masks that change much."""

from __future__ import annotations

import pytest
from support.hand_built import CHANNELS, SIZE, HandBuilt, aten, snapshots

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, requests_of
from fisedit_compile.passes import targets
from fisedit_compile.passes.sparsify.follow_statistics import follow_statistics
from fisedit_compile.passes.sparsify.sparsify_norm import sparsify_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_the_norm_reads() -> None:
    build = HandBuilt()
    norm = build.op(aten.group_norm.default, build.latents(), 2, build.weight(CHANNELS), None, 1e-6, path="norm")
    done = snapshots(build.output(norm))
    graph_module = done.after(sparsify_norm)
    report = follow_statistics(graph_module, SparsityConfig())
    assert report.changed
    requests = requests_of(graph_module.graph)
    assert {PlanTensor(kind, SIZE) for kind in ("tiles", "tile_ids", "tile_sizes")} < set(requests)  # type: ignore[arg-type]
    assert {each.kind for each in requests if isinstance(each, CacheEntry)} >= {"tiles", "scale", "shift"}
    (rows,) = graph_module.graph.find_nodes(op="call_function", target=targets.GROUP_NORM_ROWS)
    (moments,) = graph_module.graph.find_nodes(op="call_function", target=targets.TILE_MOMENTS)
    assert rows.args[0] is moments.args[0]


def test_a_second_time_nothing_is_left_to_follow() -> None:
    build = HandBuilt()
    norm = build.op(aten.group_norm.default, build.latents(), 2, None, None, 1e-6, path="norm")
    graph_module = snapshots(build.output(norm)).after(sparsify_norm)
    follow_statistics(graph_module, SparsityConfig())
    assert not follow_statistics(graph_module, SparsityConfig()).changed
