"""Attention on rows: all keys of the picture, the active ones alone, or the text's."""

from __future__ import annotations

import dataclasses
from math import prod

import pytest
import torch
from support.hand_built import (
    BATCH,
    CHANNELS,
    CONFIG,
    HEADS,
    MASKED,
    MASKS,
    SIZE,
    TOKENS,
    HandBuilt,
    arguments,
    assert_every_step_means_the_same,
    aten,
    copy_of,
    inputs,
    only,
    snapshots,
    targets_of,
)
from torch.fx import GraphModule
from torch.nn import functional as F

from fisedit_compile.config import SparsityConfig
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, ControlTensor, requests_of
from fisedit_compile.passes import targets
from fisedit_compile.passes.dense.control_cross_attention import control_cross_attention
from fisedit_compile.passes.dense.record_activations import record_activations
from fisedit_compile.passes.sparsify.sparsify_attention import sparsify_attention
from fisedit_compile.passes.text_attention import text_attentions
from fisedit_compile.testing import assert_close

pytestmark = pytest.mark.usefixtures("one_thread")

WHOLE = SparsityConfig(dense_below=5)
ATTENTION = aten.scaled_dot_product_attention.default


def self_attention(**options: float) -> GraphModule:
    """Queries, keys and values are three linear layers of the latents' tokens, which come from no convolution."""
    build = HandBuilt()
    tokens = build.tokens(build.latents())
    q, k, v = (build.heads(build.op(aten.linear.default, tokens, build.weight(CHANNELS, CHANNELS))) for _ in range(3))
    return build.output(build.unheads(build.op(ATTENTION, q, k, v, path="attn1", **options)))


def cross_attention(**options: float) -> GraphModule:
    build = HandBuilt()
    sample, text = build.latents(), build.input("text", BATCH, TOKENS, CHANNELS)
    q, k, v = (
        build.heads(build.op(aten.linear.default, x, build.weight(CHANNELS, CHANNELS)))
        for x in (build.tokens(sample), text, text)
    )
    return build.output(build.unheads(build.op(ATTENTION, q, k, v, path="attn2", **options)))


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
def test_full_self_attention_sees_fresh_keys_inside_and_the_base_s_outside(options: dict[str, float]) -> None:
    done = snapshots(self_attention(**options))
    assert done.skips() == []
    assert_every_step_means_the_same(done)


@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
def test_masked_self_attention_sees_the_active_tokens_of_its_own_sample(options: dict[str, float]) -> None:
    done = snapshots(self_attention(**options), MASKED)
    weights = [parameter.double() for parameter in done.dense.parameters()]
    (base,), (edit,) = inputs(done.dense, 0), inputs(done.dense, 1)
    tokens = edit.flatten(2).mT  # [B, S, C]
    q, k, v = (F.linear(tokens, weight).unflatten(2, (HEADS, -1)).transpose(1, 2) for weight in weights)
    for mask in MASKS.values():
        active = mask.expand(BATCH, -1, -1)
        expected = done.dense(base).clone()
        for b in range(BATCH):
            chosen = active[b].flatten()
            if chosen.any():
                out = F.scaled_dot_product_attention(*(x[b, :, chosen] for x in (q, k, v)), **options)
                expected[b].flatten(1)[:, chosen] = out.transpose(0, 1).flatten(1).T
        assert_close(done.run(done.final, done.record([base]), [edit], mask), expected)


@pytest.mark.parametrize("config", [CONFIG, MASKED], ids=["full", "masked"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}])
def test_cross_attention_sees_the_text_in_both_modes(config: object, options: dict[str, float]) -> None:
    done = snapshots(cross_attention(**options), config)
    assert done.skips() == []
    assert_every_step_means_the_same(done)


def test_exact_rewriting_in_full_mode() -> None:
    done = snapshots(self_attention(scale=0.3))
    assert arguments(only(done.after(sparsify_attention), targets.ATTENTION_CACHED)) == {
        **dict.fromkeys("qkv", targets.GATHER_ROWS),
        "base_k": CacheEntry("transpose_int_1", "map"),
        "base_v": CacheEntry("transpose_int_2", "map"),
        "row_of": PlanTensor("row_of", SIZE),
        "offsets": PlanTensor("offsets", SIZE),
        "scale": 0.3,
    }
    assert only(done.final, targets.ATTENTION_CACHED).meta["module_path"] == "attn1"


def test_exact_rewriting_in_masked_mode() -> None:
    done = snapshots(self_attention(), MASKED)
    offsets = PlanTensor("offsets", SIZE)
    attention = only(done.after(sparsify_attention), targets.ATTENTION_ROWS)
    assert arguments(attention) == {
        **dict.fromkeys("qkv", targets.GATHER_ROWS), "q_offsets": offsets, "k_offsets": offsets, "scale": None
    }  # fmt: skip
    kept = [request for request in requests_of(done.final.graph) if isinstance(request, CacheEntry)]
    assert [entry.node for entry in kept] == ["permute_default_1"]  # the output to scatter into: no keys, no values


def test_exact_rewriting_of_cross_attention() -> None:
    """Without control, which has its own form."""
    done = snapshots(cross_attention(), SparsityConfig(cross_replace=0.0, dense_below=1))
    graph_module = done.after(sparsify_attention)
    flatten, arange = aten.flatten.using_ints, aten.arange.start_step
    assert arguments(only(graph_module, targets.ATTENTION_ROWS)) == {
        "q": targets.GATHER_ROWS,
        "k": flatten,
        "v": flatten,
        "q_offsets": PlanTensor("offsets", SIZE),
        "k_offsets": arange,
        "scale": None,
    }
    assert only(graph_module, arange).args == (0, TOKENS * (BATCH + 1), TOKENS)
    assert only(graph_module, arange).kwargs["dtype"] is torch.int32


def test_exact_rewriting_of_cross_attention_that_may_be_controlled() -> None:
    dense = cross_attention()
    (cross,) = text_attentions(dense.graph)
    done = snapshots(dense)
    assert arguments(only(done.after(sparsify_attention), targets.CONTROLLED_ROWS)) == {
        "q": targets.GATHER_ROWS,
        **dict.fromkeys("kv", aten.flatten.using_ints),
        "offsets": PlanTensor("offsets", SIZE),
        "index": PlanTensor("index", SIZE),
        "maps": CacheEntry(cross.name, "attention"),
        **{kind: ControlTensor(kind) for kind in ("span", "mapper", "keep", "weight")},
        "pixels": prod(SIZE),
        "scale": None,
    }
    assert_every_step_means_the_same(done)


@pytest.mark.parametrize("part", [0, -1])
@pytest.mark.parametrize("tokens", [None, 2])
def test_a_controlled_step_of_all_pixels_is_the_controlled_dense_graph(part: int, tokens: int | None) -> None:
    dense = cross_attention()
    done = snapshots(dense)
    base, edit = inputs(dense, 0), inputs(dense, 1)
    (entry,) = [CacheEntry(node.name, "attention") for node in text_attentions(dense.graph)]
    recorder, controlled = copy_of(dense), copy_of(dense)
    record_activations(recorder, [entry], samples=1, part=part, tokens=tokens)
    control_cross_attention(controlled, CONFIG, part)
    controlled.recompile()
    (maps,) = recorder(*base)[1]
    mapper = torch.eye(TOKENS)[None]
    mapper[0, 0] = 0
    control = {
        ControlTensor("mapper"): mapper,
        ControlTensor("keep"): mapper.sum(1),
        ControlTensor("weight"): 1 + torch.arange(TOKENS)[None] / 2,
        ControlTensor("span"): torch.tensor([maps.shape[-1], part % BATCH, part % BATCH + 1], dtype=torch.int32),
        entry: maps,
    }
    expected = controlled(*edit, *(control[request] for request in requests_of(controlled.graph)))
    assert not torch.equal(expected, dense(*edit))
    mask = torch.ones(BATCH, *SIZE, dtype=torch.bool)
    assert_close(done.run(done.final, {**done.record(base), **control}, edit, mask), expected)


def test_rows_stay_gathered_through_both_attentions() -> None:
    """Paper A.3: one gather in front, one scatter behind, none between."""
    build = HandBuilt()
    sample, text = build.latents(), build.input("text", BATCH, TOKENS, CHANNELS)
    tokens = build.tokens(sample)
    for keys in (tokens, text):
        heads, kv = (build.heads(x) for x in (tokens, keys))
        out = build.op(aten.transpose.int, build.op(ATTENTION, heads, kv, kv), 1, 2)
        tokens = build.op(aten.add.Tensor, build.op(aten.reshape.default, out, [BATCH, -1, CHANNELS]), tokens)
    done = snapshots(build.output(tokens))
    operations = targets_of(done.final)
    assert (operations.count(targets.GATHER_ROWS), operations.count(targets.SCATTER_ROWS)) == (1, 1)
    assert_every_step_means_the_same(done)


def test_text_shared_by_the_batch() -> None:
    build = HandBuilt()
    sample, text = build.latents(), build.input("text", 1, TOKENS, CHANNELS)
    keys = build.heads(text)
    out = build.op(ATTENTION, build.heads(build.tokens(sample)), keys, keys, path="attn2")
    assert_every_step_means_the_same(snapshots(build.output(build.unheads(out))))


@pytest.mark.parametrize("config", [WHOLE, dataclasses.replace(WHOLE, attention="masked")], ids=["full", "masked"])
def test_on_a_whole_level_every_token_is_fresh_in_both_modes(config: SparsityConfig) -> None:
    """So neither mode asks the base for keys: there is none that the step does not compute."""
    build = HandBuilt()
    small = build.conv(build.latents(), stride=[2, 2])
    tokens = build.tokens(small)
    q, k, v = (build.heads(build.op(aten.linear.default, tokens, build.weight(CHANNELS, CHANNELS))) for _ in range(3))
    attended = build.op(aten.transpose.int, build.op(ATTENTION, q, k, v), 1, 2)
    small = build.op(aten.permute.default, build.op(aten.reshape.default, attended, [BATCH, 3, 3, 4]), [0, 3, 1, 2])
    large = build.op(aten.upsample_nearest2d.vec, small, list(SIZE), None)
    done = snapshots(build.output(build.conv(large)), config)
    offsets = PlanTensor("offsets", (3, 3))
    attention = only(done.after(sparsify_attention), targets.ATTENTION_ROWS)
    assert arguments(attention) == {
        **dict.fromkeys("qkv", targets.GATHER_ROWS), "q_offsets": offsets, "k_offsets": offsets, "scale": None
    }  # fmt: skip
    assert_every_step_means_the_same(done)
