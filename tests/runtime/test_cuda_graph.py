"""Stages at fixed addresses: what they return belongs to the caller, whatever runs next and in whatever mode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.unets import UNets
from torch.fx import symbolic_trace

from fisedit_compile.architectures import build_unet, unet_inputs
from fisedit_compile.compiler.stage_graph import StageGraph
from fisedit_compile.ir.requests import Weight
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.runtime.control import Control
from fisedit_compile.runtime.cuda_graph import GraphCapturer, StaticStage
from fisedit_compile.runtime.stage import Stage
from fisedit_compile.sparse_unet import SparseUNet, sparsify

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class Scaled(torch.nn.Module):
    """Returns a tensor and a tuple of two, one of which is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, sample: torch.Tensor, time: torch.Tensor) -> Any:
        return sample * self.weight, (sample + time.to(sample.device), sample)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def scaled(device: torch.device) -> tuple[Scaled, StaticStage]:
    module = Scaled().to(device)
    stage = Stage(StageGraph(symbolic_trace(module)), compiled=False)
    return module, StaticStage(stage, GraphCapturer(device), {Weight("weight"): module.weight})


def values(sample: float, device: torch.device) -> dict[str, torch.Tensor]:
    """The time on the host, as some schedulers have it."""
    return {"sample": torch.full((2,), sample, device=device), "time": torch.tensor(10.0)}


def numbers(result: Any) -> list[list[float]]:
    product, (total, same) = result
    return [each.tolist() for each in (product, total, same)]


def test_a_result_outlives_the_next_call(scaled: tuple[Scaled, StaticStage], device: torch.device) -> None:
    _, stage = scaled
    given = values(1.0, device)
    first, second = stage(given), stage(values(4.0, device))
    given["sample"].zero_()
    assert numbers(first) == [[2, 3], [11, 11], [1, 1]]
    assert numbers(second) == [[8, 12], [14, 14], [4, 4]]


def test_tensors_of_another_shape_are_not_spread_over_the_old_ones(
    scaled: tuple[Scaled, StaticStage], device: torch.device
) -> None:
    _, stage = scaled
    stage({**values(1.0, device), "sample": torch.ones(3, 2, device=device)})
    assert numbers(stage(values(4.0, device))) == [[8, 12], [14, 14], [4, 4]]


@pytest.mark.parametrize("moved", [False, True])
def test_a_changed_weight_counts(scaled: tuple[Scaled, StaticStage], device: torch.device, moved: bool) -> None:
    module, stage = scaled
    stage(values(1.0, device))
    if moved:
        module.weight.data = module.weight.data + 1
        stage.forget()
    else:
        module.weight.data += 1
    assert numbers(stage(values(1.0, device)))[0] == [3, 4]


def test_inference_mode_may_come_and_go(scaled: tuple[Scaled, StaticStage], device: torch.device) -> None:
    _, stage = scaled
    with torch.inference_mode():
        first = stage(values(1.0, device))
    second = stage(values(2.0, device))
    with torch.inference_mode():
        third = stage(values(3.0, device))
    assert [numbers(each)[0] for each in (first, second, third)] == [[2, 3], [4, 6], [6, 9]]
    assert not second[0].requires_grad


@pytest.mark.parametrize("first", [True, False])
def test_a_step_at_fixed_sizes_may_be_taken_in_inference_mode(unets: UNets, first: bool) -> None:
    base = unets.recorded(unets.sparse("micro"), "micro", 2, (18, 16))
    sparse = sparsify(unets.dense("micro"))
    sparse.program(base.call).fixed_sizes = True
    masks = [square_mask(share, base.call.signature.sample_shape[2:]) for share in (0.1, 0.5)]

    def steps() -> list[torch.Tensor]:
        return [sparse.step(base.call, base.cache, sparse.prepare(base.call, mask)) for mask in masks]

    with torch.inference_mode(first):
        expected = steps()
    with torch.inference_mode(not first):
        again = steps()
    assert all(map(torch.equal, expected, again))


class Controlled:
    """A U-Net in bf16 on the GPU, the attention maps of a base, and what controls an edit of it."""

    def __init__(self) -> None:
        unet = build_unet("tiny", device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        self.sparse: SparseUNet = sparsify(unet)
        self.calls = [self.call(seed) for seed in range(3)]
        _, self.cache = self.sparse.record(self.calls[0], samples=1, activations=False, attention=True)
        tokens = self.calls[0].kwargs["encoder_hidden_states"].shape[1]
        self.mapper, self.keep = torch.eye(tokens, device="cuda")[None], torch.ones(1, tokens, device="cuda")

    def call(self, seed: int) -> Any:
        args, kwargs = unet_inputs(self.sparse.unet, batch=2, height=512, width=512, seed=seed)
        return self.sparse.call(*args, **kwargs)

    def run(self, edit: int) -> torch.Tensor:
        return self.sparse.controlled(self.calls[edit], self.cache, Control(self.mapper, self.keep))


@pytest.mark.gpu
def test_dense_steps_are_what_they_are_launched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    of = Controlled()
    results = [of.run(1), of.run(2), of.run(1)]
    recorded = [of.sparse.record(call) for call in of.calls]
    monkeypatch.setattr(GraphCapturer, "capture", lambda self, run: run)
    plain = sparsify(of.sparse.unet, of.sparse.sparsity)
    of.sparse = plain
    expected = [of.run(1), of.run(2), of.run(1)]
    assert all(map(torch.equal, results, expected))
    for (out, cache), call in zip(recorded, of.calls, strict=True):
        wanted, kept = plain.record(call)
        assert torch.equal(out, wanted)
        assert all(torch.equal(cache[entry], kept[entry]) for entry in kept)


@pytest.mark.gpu
def test_a_dense_step_waits_for_nothing() -> None:
    of = Controlled()
    expected = of.run(1)
    side = torch.cuda.Stream()
    with of.sparse.looked_at():  # a look at the model waits, once for all steps of an edit
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            here = of.run(1)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                there = of.run(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(here, expected)
    assert torch.equal(there, expected)
