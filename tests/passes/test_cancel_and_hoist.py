"""What is left after the rewriting: pairs that meet cancel, and what stays the same leaves the step."""

from __future__ import annotations

import pytest
import torch
from support.hand_built import (
    BATCH,
    CHANNELS,
    CONFIG,
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
    some_mask,
    targets_of,
    without_control,
)
from torch.fx import Graph, GraphModule

from fisedit_compile.ir.layout import Layout
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.requests import CacheEntry, Hoisted, Inputs, requests_of
from fisedit_compile.ir.taps import Taps
from fisedit_compile.passes import targets
from fisedit_compile.passes.region.cancel_scatter_gather import cancel_scatter_gather
from fisedit_compile.passes.staging.hoist_invariants import (
    HOISTED_STAGES,
    fetched_rows,
    hoist_invariants,
    is_fetch,
    split_stages,
)
from fisedit_compile.planning.edit_plan import plan_edit
from fisedit_compile.testing import assert_close

TAPS = Taps(SIZE, SIZE, kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))

pytestmark = pytest.mark.usefixtures("one_thread")


class TestCancel:
    def test_a_chain_is_rows_from_end_to_end(self) -> None:
        build = HandBuilt()
        x = build.latents()
        for op in (aten.silu.default, aten.neg.default, aten.tanh.default):
            x = build.op(op, x)
        done = snapshots(build.output(x))
        before = targets_of(done.before(cancel_scatter_gather))
        assert before.count(targets.SCATTER_ROWS) == 3
        after = [targets.GATHER_ROWS, aten.silu.default, aten.neg.default, aten.tanh.default, targets.SCATTER_ROWS]
        assert targets_of(done.after(cancel_scatter_gather)) == after
        assert [r for r in requests_of(done.final.graph) if isinstance(r, CacheEntry)] == [CacheEntry(x.name, "map")]

    def test_a_dense_reader_in_the_middle_keeps_its_scatter(self) -> None:
        build = HandBuilt()
        x = build.op(aten.silu.default, build.latents())
        rolled = build.op(aten.roll.default, x, [1], [3], path="roll")
        done = snapshots(build.output(build.op(aten.add.Tensor, rolled, x, path="sum")))
        after = done.after(cancel_scatter_gather)
        assert targets_of(after).count(targets.SCATTER_ROWS) == 2
        assert only(after, aten.roll.default).args[0].target is targets.SCATTER_ROWS
        assert {arg.target for arg in only(after, aten.add.Tensor).args} == {targets.GATHER_ROWS, aten.silu.default}
        reasons = done.skips("cancel_scatter_gather")
        assert set(reasons) == {
            ("", "its value is dense: the region begins here"),  # the latents
            ("roll", "its value is dense: the region begins here"),
        }
        assert_every_step_means_the_same(done)

    def test_nothing_that_nobody_reads_is_asked_for(self) -> None:
        build = HandBuilt()
        sample, unused = build.latents(), build.input("text", BATCH, TOKENS, CHANNELS)
        build.op(aten.silu.default, build.conv(sample), path="dead")
        done = snapshots(build.output(build.op(aten.neg.default, sample)))
        assert targets_of(done.final) == [targets.GATHER_ROWS, aten.neg.default, targets.SCATTER_ROWS]
        assert all(node.users for node in done.final.graph.find_nodes(op="placeholder") if "request" in node.meta)
        assert unused.users == {}


def a_step() -> GraphModule:
    """Latents, text and a timestep: a convolution, its time embedding, and cross-attention."""
    build = HandBuilt()
    sample, timestep = build.latents(), build.input("timestep", BATCH)
    text = build.input("encoder_hidden_states", BATCH, TOKENS, CHANNELS)
    temb = build.op(aten.mul.Tensor, build.weight(CHANNELS, 1), timestep, path="time_embedding")
    temb = build.op(aten.transpose.int, temb, 0, 1, path="time_embedding")
    x = build.conv(build.op(aten.silu.default, sample), path="conv1")
    x = build.op(aten.add.Tensor, x, build.op(aten.reshape.default, temb, [BATCH, CHANNELS, 1, 1]))
    x = build.conv(x, path="conv2")
    key = build.op(aten.linear.default, text, build.weight(CHANNELS, CHANNELS), path="to_k")
    heads = build.heads(key)
    attended = build.op(
        aten.scaled_dot_product_attention.default, build.heads(build.tokens(x)), heads, heads, path="attn2"
    )
    return build.output(build.unheads(attended))


class TestHoist:
    @pytest.fixture(scope="class")
    def done(self) -> Snapshots:
        return snapshots(a_step())

    def test_each_operation_is_in_the_earliest_stage_that_has_what_it_needs(self, done: Snapshots) -> None:
        stages: dict[str, set[object]] = {}
        for node in done.final.graph.nodes:
            if node.op == "call_function":
                stages.setdefault(node.meta["stage"], set()).add(node.meta["module_path"])
        assert stages["constant"] == {"conv1", "conv2"}  # packed weights
        assert stages["prompt"] >= {"to_k"}
        assert stages["fetch"] == {"conv1", "conv2"}  # halo rows
        assert not stages["step"] & {"to_k", "time_embedding"}  # the time embedding is the base's
        hoisted = sum(node.meta.get("stage", "step") != "step" for node in done.final.graph.nodes)
        assert done.reports["hoist_invariants"].changed == hoisted

    def test_stages_split(self, done: Snapshots) -> None:
        stages = split_stages(done.final)
        assert list(stages) == [*HOISTED_STAGES, "step"]
        for name in HOISTED_STAGES:
            output = stages[name].graph.output_node()
            assert output.meta["stage"] == name
            assert len(output.args[0]) == len(output.meta["values"])
        kinds = {name: {type(r) for r in requests_of(graph.graph)} for name, graph in stages.items()}
        assert kinds["constant"] == set()
        assert kinds["fetch"] == {PlanTensor, CacheEntry}
        assert Hoisted in kinds["step"]
        inputs_of = {
            name: [n.target for n in placeholders_of(graph) if "request" not in n.meta]
            for name, graph in stages.items()
        }
        assert inputs_of == {
            "constant": [],
            "prompt": ["encoder_hidden_states"],
            "fetch": [],
            "step": ["sample"],
        }
        assert aten.index_select.default not in [
            node.target for node in stages["step"].graph.nodes if node.meta.get("module_path") in ("conv1", "conv2")
        ]

    def test_the_stages_one_after_another_are_the_whole(self, done: Snapshots) -> None:
        mask = some_mask()
        requests = requests_of(done.final.graph)
        plan = plan_edit(mask, [request for request in requests if isinstance(request, PlanTensor)], batch=BATCH)
        kept, edit = done.record(inputs(done.dense, 0)), inputs(done.dense, 1)
        names = [node.target for node in placeholders_of(done.dense)]
        values: dict[object, torch.Tensor] = {**dict(zip(names, edit, strict=True)), **kept}
        values.update({request: plan.tensor(request) for request in requests if isinstance(request, PlanTensor)})
        values.update(without_control(done.final))
        for name, stage in split_stages(done.final).items():
            asked = [n.meta.get("request", n.target) for n in placeholders_of(stage)]
            out = stage(*(values[request] for request in asked))
            if name != "step":
                hoisted = [Hoisted(name, value) for value in stage.graph.output_node().meta["values"]]
                values.update(zip(hoisted, out, strict=True))
        assert_close(out, done.run(done.final, kept, edit, mask))

    def test_a_sum_of_prompt_and_timestep_belongs_to_the_step(self) -> None:
        """SDXL adds the pooled text to the time embedding."""
        build = HandBuilt()
        sample, timestep = build.latents(), build.input("timestep")
        pooled = build.op(aten.silu.default, build.input("text_embeds", BATCH, CHANNELS), path="pooled")
        emb = build.op(aten.add.Tensor, timestep, pooled, path="emb")
        emb = build.op(aten.reshape.default, emb, [BATCH, CHANNELS, 1, 1])
        done = snapshots(build.output(build.op(aten.add.Tensor, build.conv(sample), emb)))
        stages = {node.meta.get("module_path"): node.meta.get("stage") for node in done.final.graph.nodes}
        assert (stages["pooled"], stages["emb"]) == ("prompt", "step")

    def test_only_halos_are_fetched(self, done: Snapshots) -> None:
        fetched = fetched_rows(done.final)
        selects = done.final.graph.find_nodes(op="call_function", target=aten.index_select.default)
        assert list(fetched) == [Hoisted("fetch", node.name) for node in selects]  # the embedding's is in its product
        assert {node.meta["stage"] for node in selects} == {"fetch"}
        assert [entry.kind for entry, _ in fetched.values()] == ["map", "map"]
        assert {rows for _, rows in fetched.values()} == {PlanTensor("halo", TAPS)}

    @pytest.mark.parametrize(
        ("base", "dim", "index", "stage"),
        [
            (CacheEntry("conv", "map"), 0, PlanTensor("halo", TAPS), "fetch"),
            (CacheEntry("temb", "value"), 0, PlanTensor("sample", SIZE), "step"),
            (CacheEntry("conv", "map"), 0, PlanTensor("index", SIZE), "step"),
            (CacheEntry("conv", "map"), 0, "timestep", "step"),
            ("text", 0, PlanTensor("halo", TAPS), "step"),
        ],
    )
    def test_what_a_fetch_is(self, base: object, dim: int, index: object, stage: str) -> None:
        graph = Graph()
        latents = graph.placeholder("sample")
        latents.meta.update(val=torch.empty(BATCH, CHANNELS, *SIZE), layout=Layout("bchw", SIZE))
        asked = Inputs(graph)
        given = {"timestep": torch.empty(BATCH), "text": torch.empty(BATCH, TOKENS, CHANNELS)}
        nodes = []
        for request in (base, index):
            nodes.append(graph.placeholder(request) if isinstance(request, str) else asked(request))
            if isinstance(request, str):
                nodes[-1].meta["val"] = given[request]
        select = graph.call_function(aten.index_select.default, (nodes[0], dim, nodes[1]))
        graph.output(select)
        hoist_invariants(GraphModule({}, graph), CONFIG)
        assert select.meta["stage"] == stage
        assert is_fetch(select) == (stage == "fetch")

    def test_two_resolutions_have_their_own_plan_tensors(self) -> None:
        build = HandBuilt()
        x = build.conv(build.conv(build.latents()), stride=[2, 2])
        x = build.op(aten.group_norm.default, build.conv(x), 2)
        large = build.op(aten.upsample_nearest2d.vec, x, list(SIZE), None)
        done = snapshots(build.output(build.conv(large)))
        kinds = {(r.kind, r.where) for r in requests_of(done.final.graph) if isinstance(r, PlanTensor)}
        assert {("sample", (3, 3)), ("index", SIZE)} <= kinds
        names = [node.target for node in done.final.graph.find_nodes(op="placeholder")]
        assert len(names) == len(set(names))
