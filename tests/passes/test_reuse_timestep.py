"""What depends on the timestep alone is the base's: an edit repeats the timesteps that its base was made at."""

from __future__ import annotations

import pytest
import torch
from support.hand_built import (
    BATCH,
    CHANNELS,
    SIZE,
    HandBuilt,
    Snapshots,
    arguments,
    assert_every_step_means_the_same,
    assert_means_the_same,
    aten,
    placeholders_of,
    snapshots,
    targets_of,
)
from torch.fx import Node

from fisedit_compile.ir.requests import CacheEntry, requests_of
from fisedit_compile.passes import targets
from fisedit_compile.passes.rewriting import is_timestep
from fisedit_compile.passes.staging.reuse_timestep import reuse_timestep

pytestmark = pytest.mark.usefixtures("one_thread")


def embedded(build: HandBuilt, timestep: Node) -> Node:
    """Sinusoids and a linear layer: [B] or [] -> [B or 1, C]."""
    frequencies = build.op(aten.mul.Tensor, build.weight(CHANNELS), 0.5, path="time_proj")
    angles = build.op(aten.mul.Tensor, build.op(aten.reshape.default, timestep, [-1, 1]), frequencies)
    return build.op(aten.linear.default, angles, build.weight(CHANNELS, CHANNELS), path="time_embedding")


def projected(build: HandBuilt, embedding: Node, path: str) -> Node:
    """As each ResNet does it: [B, C] -> [B, C, 1, 1]."""
    out = build.op(aten.silu.default, embedding, path=path)
    out = build.op(aten.linear.default, out, build.weight(CHANNELS, CHANNELS), build.weight(CHANNELS), path=path)
    return build.op(aten.reshape.default, out, [-1, CHANNELS, 1, 1], path=path)


def values(done: Snapshots) -> list[str]:
    requests = requests_of(done.after(reuse_timestep).graph)
    return [request.node for request in requests if isinstance(request, CacheEntry) and request.kind == "value"]


@pytest.mark.parametrize("shape", [(), (BATCH,)])
def test_the_projection_of_each_resnet_is_the_base_s(shape: tuple[int, ...]) -> None:
    build = HandBuilt()
    sample, timestep = build.latents(), build.input("timestep", *shape)
    embedding, x = embedded(build, timestep), build.conv(sample)
    kept = []
    for path in ("resnet0", "resnet1"):
        kept.append(projected(build, embedding, path))
        x = build.conv(build.op(aten.add.Tensor, x, kept[-1], path=path), path=path)
    done = snapshots(build.output(x))
    assert values(done) == [node.name for node in kept]
    graph_module = done.after(reuse_timestep)
    assert not {aten.linear.default, aten.silu.default} & set(targets_of(graph_module))
    assert "timestep" not in [node.target for node in placeholders_of(graph_module)]
    assert [change.module_path for change in done.reports["reuse_timestep"].changes] == ["resnet0", "resnet1"]
    assert_means_the_same(done, reuse_timestep)
    assert_every_step_means_the_same(done)


def test_exact_rewriting() -> None:
    build = HandBuilt()
    sample, timestep = build.latents(), build.input("timestep", BATCH)
    shift = build.op(aten.reshape.default, timestep, [BATCH, 1, 1, 1])
    done = snapshots(build.output(build.op(aten.add.Tensor, build.conv(sample), shift)))
    before, after = (
        {node.name: node for node in graph.graph.nodes}
        for graph in (done.before(reuse_timestep), done.after(reuse_timestep))
    )
    assert shift.name not in after
    entry = after[f"base_value_{shift.name}"]
    assert entry.meta["request"] == CacheEntry(shift.name, "value")
    assert {user.name for user in entry.users} == {user.name for user in before[shift.name].users}
    assert set(before) - set(after) == {shift.name, "timestep"}


def test_a_value_that_the_timestep_s_own_chain_reads_too() -> None:
    build = HandBuilt()
    sample, timestep = build.latents(), build.input("timestep", BATCH)
    first = projected(build, embedded(build, timestep), "first")
    second = build.op(aten.tanh.default, first, path="second")
    x = build.op(aten.add.Tensor, build.conv(sample), first)
    done = snapshots(build.output(build.op(aten.add.Tensor, build.conv(x), second)))
    assert values(done) == [first.name, second.name]  # not the one computed from the other
    assert aten.tanh.default not in targets_of(done.after(reuse_timestep))
    assert_means_the_same(done, reuse_timestep)


def test_a_dense_operation_reads_the_base_s_value_as_well() -> None:
    build = HandBuilt()
    sample, timestep = build.latents(), build.input("timestep", BATCH)
    shift = projected(build, embedded(build, timestep), "resnet")
    rolled = build.op(aten.roll.default, build.conv(sample), [1], [3])
    done = snapshots(build.output(build.op(aten.mul.Tensor, rolled, shift)))
    assert values(done) == [shift.name]
    assert_means_the_same(done, reuse_timestep)


def test_where_the_prompt_enters_it_stays_in_the_step_and_what_comes_before_is_the_base_s() -> None:
    """SDXL adds the pooled text to the time embedding."""
    build = HandBuilt()
    sample, timestep = build.latents(), build.input("timestep", BATCH)
    pooled = build.input("text_embeds", BATCH, CHANNELS)
    embedding = embedded(build, timestep)
    both = build.op(aten.add.Tensor, embedding, pooled, path="add_embedding")
    done = snapshots(build.output(build.op(aten.add.Tensor, build.conv(sample), projected(build, both, "resnet"))))
    assert values(done) == [embedding.name]
    graph_module = done.after(reuse_timestep)
    total = graph_module.graph.find_nodes(op="call_function", target=aten.add.Tensor)[0]
    assert arguments(total) == {"input": CacheEntry(embedding.name, "value"), "other": "text_embeds"}
    assert targets_of(graph_module).count(aten.linear.default) == 1
    stages = {n.meta.get("stage") for n in done.final.graph.nodes if n.meta.get("module_path") == "add_embedding"}
    assert stages == {"step"}
    assert_means_the_same(done, reuse_timestep)


def test_skips_a_timestep_that_meets_the_region_as_it_is() -> None:
    build = HandBuilt()
    sample, timestep = build.latents(), build.input("timestep")
    done = snapshots(build.output(build.op(aten.add.Tensor, build.conv(sample), timestep)))
    assert (values(done), done.reports["reuse_timestep"].changed) == ([], 0)
    assert "timestep" in [node.target for node in placeholders_of(done.final)]
    assert_means_the_same(done, reuse_timestep)


def test_skips_what_depends_on_weights_or_the_prompt_alone() -> None:
    build = HandBuilt()
    sample, text = build.latents(), build.input("text", BATCH, CHANNELS)
    of_weights = build.op(aten.tanh.default, build.weight(CHANNELS, 1, 1))
    of_text = build.op(aten.reshape.default, build.op(aten.silu.default, text), [BATCH, CHANNELS, 1, 1])
    x = build.op(aten.add.Tensor, build.conv(sample), of_weights)
    done = snapshots(build.output(build.op(aten.add.Tensor, x, of_text)))
    assert (values(done), done.reports["reuse_timestep"].changed) == ([], 0)
    assert_means_the_same(done, reuse_timestep)


def test_skips_what_the_latents_are_part_of() -> None:
    build = HandBuilt()
    sample, timestep = build.latents(), build.input("timestep", BATCH)
    mean = build.op(aten.mean.dim, sample, [1, 2, 3])
    shift = build.op(aten.add.Tensor, mean, timestep)
    shift = build.op(aten.reshape.default, shift, [BATCH, 1, 1, 1])
    done = snapshots(build.output(build.op(aten.mul.Tensor, sample, shift)))
    assert (values(done), done.reports["reuse_timestep"].changed) == ([], 0)


def test_which_inputs_are_timesteps() -> None:
    build = HandBuilt()
    latents, number, numbers = build.latents(), build.input("timestep"), build.input("timesteps", BATCH)
    text, pooled = build.input("text", BATCH, 3, CHANNELS), build.input("pooled", BATCH, CHANNELS)
    build.output(build.op(aten.silu.default, latents))
    given = [is_timestep(node) for node in (latents, number, numbers, text, pooled)]
    assert given == [False, True, True, False, False]


def test_the_base_keeps_a_copy_of_each_value() -> None:
    build = HandBuilt()
    sample, timestep = build.latents(), build.input("timestep", BATCH)
    shift = build.op(aten.reshape.default, timestep, [BATCH, 1, 1, 1])
    done = snapshots(build.output(build.op(aten.add.Tensor, build.op(aten.silu.default, sample), shift)))
    given = [torch.randn(BATCH, CHANNELS, *SIZE).double(), torch.tensor([3.0, 7.0]).double()]
    kept = done.record(given)
    given[1].zero_()
    assert kept[CacheEntry(shift.name, "value")].flatten().tolist() == [3.0, 7.0]
    assert targets.SCATTER_ROWS in targets_of(done.final)
