"""All passes in their order: between any two of them the graph runs, and means the same."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.hand_built import (
    BATCH,
    CHANNELS,
    CONFIG,
    MASKED,
    SIZE,
    TOKENS,
    HandBuilt,
    Snapshots,
    assert_every_step_means_the_same,
    aten,
    inputs,
    only,
    placeholders_of,
    snapshots,
    targets_of,
)
from torch.fx import GraphModule, Interpreter, Node

from fisedit_compile.compiler.export import export
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import SparsifyError
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.passes import targets
from fisedit_compile.passes.arguments import arguments_of, call_form
from fisedit_compile.passes.manager import SPARSE_PASSES, run_passes
from fisedit_compile.passes.region.annotate_layout import annotate_layout
from fisedit_compile.testing import assert_close

if TYPE_CHECKING:
    from support.unets import UNets

pytestmark = pytest.mark.usefixtures("one_thread")


def everything(*, norms: bool = True) -> GraphModule:
    """A U-Net in small: time embedding, convolutions down and up, a skip, self- and cross-attention, GEGLU."""
    build = HandBuilt()
    sample = build.latents()
    text, temb = build.input("text", BATCH, TOKENS, CHANNELS), build.input("temb", BATCH, CHANNELS)
    skip = build.conv(sample)
    x = build.op(aten.silu.default, skip)
    if norms:
        x = build.op(aten.group_norm.default, x, 2, build.weight(CHANNELS), build.weight(CHANNELS), 1e-6)
    x = build.conv(x, stride=[2, 2])
    x = build.op(aten.add.Tensor, x, build.op(aten.reshape.default, temb, [BATCH, CHANNELS, 1, 1]))
    x = build.op(aten.upsample_nearest2d.vec, x, list(SIZE), None)
    x = build.op(aten.cat.default, [build.conv(x), skip], 1)
    residual = x = build.conv(x, kernel=1)
    tokens = build.tokens(x)
    if norms:
        tokens = build.op(aten.layer_norm.default, tokens, [CHANNELS], build.weight(CHANNELS), None, 1e-5)
    for keys in (tokens, text):
        q, k, v = (
            build.heads(build.op(aten.linear.default, y, build.weight(CHANNELS, CHANNELS), None))
            for y in (tokens, keys, keys)
        )
        attended = build.op(aten.scaled_dot_product_attention.default, q, k, v)
        attended = build.op(aten.transpose.int, attended, 1, 2)
        tokens = build.op(aten.add.Tensor, build.op(aten.reshape.default, attended, [BATCH, -1, CHANNELS]), tokens)
    wide = build.op(aten.linear.default, tokens, build.weight(2 * CHANNELS, CHANNELS), build.weight(2 * CHANNELS))
    pieces = build.op(aten.chunk.default, wide, 2, -1)
    value, gate = (build.op(operator.getitem, pieces, number) for number in (0, 1))
    x = build.op(aten.mul.Tensor, value, build.op(aten.gelu.default, gate))
    x = build.op(aten.permute.default, build.op(aten.reshape.default, x, [BATCH, *SIZE, CHANNELS]), [0, 3, 1, 2])
    return build.output(build.conv(build.op(aten.add.Tensor, x, residual), path="conv_out"))


class WithEveryValue(Interpreter):
    """Runs a graph and holds the value of each node to its ``meta["val"]``."""

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.op != "output":
            assert shapes(value) == shapes(n.meta["val"]), f"{n.format_node()}: meta['val'] is of another shape"
        return value


def shapes(value: Any) -> list[tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of a tensor, or of each of several."""
    return [(each.shape, each.dtype) for each in (value if isinstance(value, tuple | list) else [value])]


def assert_invariants(done: Snapshots, base: Sequence[torch.Tensor]) -> None:
    """What passes/README.md promises to hold between passes, after each of them."""
    kept, every_pixel = done.record(base), torch.ones(1, *base[0].shape[2:], dtype=torch.bool)
    of_the_unet = [node.target for node in placeholders_of(done.dense)]
    names = {node.name for node in done.dense.graph.nodes}
    for graph_module in done.graphs.values():
        WithEveryValue(graph_module).run(*done.given(graph_module, kept, base, every_pixel))
        for node in graph_module.graph.nodes:
            if node.op == "output":
                continue
            assert isinstance(node.meta["module_path"], str)
            assert not {"layout", "row_layout"} <= set(node.meta)
            if layout := node.meta.get("row_layout"):
                for shape, _ in shapes(node.meta["val"]):
                    assert shape[0] == base[0].shape[0] * prod(layout.size)
                    assert len(shape) == 1 + layout.roles.count("c")
            if node.op == "call_function":
                assert (node.name in names) or node.meta["added"]
                assert not (isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable)
                if "fisedit" in str(node.target):
                    assert call_form(node.target, arguments_of(node)) == (node.args, node.kwargs)
        requests = [node.meta.get("request") for node in placeholders_of(graph_module)]
        inputs_first = [node.target for node in placeholders_of(graph_module)][: requests.count(None)]
        assert inputs_first == [name for name in of_the_unet if name in inputs_first]
        assert len(set(requests) - {None}) == len(requests) - requests.count(None)
        asked = {request.node for request in requests if isinstance(request, CacheEntry)}
        assert asked <= names


@pytest.mark.parametrize("config", [CONFIG, MASKED, SparsityConfig(dense_below=5)], ids=["full", "masked", "whole"])
def test_what_holds_between_passes(config: SparsityConfig) -> None:
    done = snapshots(everything(), config)
    assert_invariants(done, inputs(done.dense, 0))


def test_every_graph_between_two_passes_runs_and_means_the_same() -> None:
    assert_every_step_means_the_same(snapshots(everything(norms=False)))
    assert_every_step_means_the_same(snapshots(everything()), statistics=True)


def test_with_the_lower_resolution_dense_too() -> None:
    done = snapshots(everything(norms=False), SparsityConfig(dense_below=5))
    assert_every_step_means_the_same(done)
    assert {reason for _, reason in done.skips("select_region")} == {"resolution 3x3 is below dense_below=5"}


@pytest.mark.parametrize("attention", ["full", "masked"])
def test_every_graph_of_a_unet_between_two_passes_runs_and_means_the_same(unets: UNets, attention: str) -> None:
    batch, size = 2, (13, 10)
    sparse = unets.sparse("micro", torch.float64, attention, 4)
    calls = [unets.call(sparse, "micro", batch, size, seed) for seed in (0, 1)]
    dense = export(unets.dense("micro"), calls[0])
    annotate_layout(dense, sparse.sparsity)
    done = snapshots(dense, sparse.sparsity)
    base, edit = (call.tensors for call in calls)
    mask = torch.rand(batch, *size, generator=torch.Generator().manual_seed(0)) < 0.3
    # these give the sparse graph its meaning, the others keep it
    gives_meaning = {"insert_gather_scatter", "sparsify_norm"}
    if attention == "masked":
        gives_meaning.add("sparsify_attention")
    assert_invariants(done, base)
    kept, base_out, meant = done.record(base), done.dense(*base), done.dense(*edit)
    for name, graph_module in done.graphs.items():
        for active in [torch.ones_like(mask)] + [mask] * (attention == "full"):
            assert_close(done.run(graph_module, kept, base, active), base_out)
        out = done.run(graph_module, kept, edit, mask)
        if name in gives_meaning:
            assert not torch.equal(out, meant)
            meant = out
        assert_close(out, meant)


def test_nothing_dense_is_left_of_a_graph_that_can_be_sparse_from_end_to_end() -> None:
    done = snapshots(everything())
    left = set(targets_of(done.final)) - {
        targets.CONV2D_ROWS,
        targets.GROUP_NORM_ROWS,
        targets.ATTENTION_CACHED,
        targets.ATTENTION_ROWS,
    }
    assert not left & {targets.CONV, targets.GROUP_NORM, targets.ATTENTION, targets.UPSAMPLE, targets.GATHER_ROWS}
    assert targets_of(done.final)[-1] is targets.SCATTER_ROWS
    assert len(done.final.graph.find_nodes(op="call_function", target=targets.SCATTER_ROWS)) == 1
    assert done.skips() == []


def test_reports_name_their_pass_and_what_they_changed() -> None:
    graph_module = everything()
    reports = run_passes(graph_module, CONFIG)
    assert [report.name for report in reports] == [rewrite.__name__ for rewrite in SPARSE_PASSES]
    changed = {report.name: report.changed for report in reports}
    assert (changed["sparsify_conv"], changed["sparsify_norm"], changed["sparsify_attention"]) == (5, 1, 2)
    assert all(report.seconds > 0 for report in reports)
    assert str(reports[3]).startswith("sparsify_conv: 5 changed, 0 skipped, ")


def test_the_dense_graph_is_not_touched_by_what_runs_on_a_copy() -> None:
    dense = everything()
    text, out = str(dense.graph), dense(*inputs(dense, 0))
    snapshots(dense, MASKED)
    assert str(dense.graph) == text
    assert torch.equal(dense(*inputs(dense, 0)), out)


def test_a_graph_with_nothing_spatial_is_refused() -> None:
    build = HandBuilt()
    text = build.input("text", BATCH, TOKENS, CHANNELS)
    graph_module = build.output(build.op(aten.linear.default, text, build.weight(CHANNELS, CHANNELS)))
    with pytest.raises(SparsifyError, match=r"nothing to make sparse.*lower dense_below, or edit a larger picture"):
        run_passes(graph_module, CONFIG)


def test_the_passes_change_no_value_that_a_caller_sees() -> None:
    """Names of the user's inputs stay, in their order; what a pass adds stands behind them."""
    done = snapshots(everything())
    names = [node.target for node in done.final.graph.find_nodes(op="placeholder") if "request" not in node.meta]
    assert names == ["sample", "text", "temb"]
    assert only(done.final, targets.SCATTER_ROWS).meta["module_path"] == "conv_out"
