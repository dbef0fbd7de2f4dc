"""Calibration against timers whose times are known, and on the CPU."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.unets import UNets

from fisedit_compile.cli import main
from fisedit_compile.cost_model import calibration as calibration_module
from fisedit_compile.cost_model.calibration import Calibration, calibrate
from fisedit_compile.cost_model.layer_timer import LayerTimer, square_table
from fisedit_compile.cost_model.row_costs import RowCosts
from fisedit_compile.cost_model.row_layers import LayerShape, RowLayer, row_layers
from fisedit_compile.masks.sample_masks import square_mask
from fisedit_compile.sparse_unet import sparsify

CPU = torch.device("cpu")
CONV = LayerShape("convolution", 320, 640, taps=9)
LINEAR = LayerShape("linear", 64, 256, geglu=True)
SHAPES = [
    CONV, LINEAR,
    LayerShape("self_attention", 32, 32, samples=2, heads=4),
    LayerShape("cached_attention", 32, 32, samples=2, heads=4, keys=64),
    LayerShape("text_attention", 32, 32, samples=2, heads=4, keys=7),
]  # fmt: skip


class Formula:
    """A timer that computes; ``wave`` makes a staircase of it."""

    def __init__(self, launch: float = 5.0, rate: float = 2e5, bandwidth: float = 1e6, wave: int = 1) -> None:
        self.constants, self.wave, self.calls = (launch, rate, bandwidth), wave, 0

    def layer(self, shape: LayerShape, rows: int) -> float:
        self.calls += 1
        launch, rate, bandwidth = self.constants
        full = math.ceil(rows / self.wave) * self.wave
        return launch + max(shape.macs(full) / rate, shape.bytes(full, 4) / bandwidth)

    def fetch(self, channels: int, rows: int) -> float:
        return 2 * 4 * rows * channels / self.constants[2]


def layers(*shapes: LayerShape, most: int = 4096) -> list[RowLayer]:
    return [RowLayer(f"layer{i}", shape, (32, 64), most, halo=(32, 64)) for i, shape in enumerate(shapes)]


def test_a_roofline_is_found_and_predicts() -> None:
    timer = Formula()
    found = calibrate(layers(*SHAPES), CPU, torch.float32, timer=timer)
    assert found.roofline.rate == pytest.approx(2e5, rel=0.05)
    assert found.held_out["roofline"] < 0.05
    for shape in SHAPES:
        for rows in (64, 100, 777, 4096, 5000):
            assert found.microseconds(shape, rows) == pytest.approx(timer.layer(shape, rows), rel=0.05)
    assert found.fetch_microseconds(640, 100) == pytest.approx(timer.fetch(640, 100))
    assert found.microseconds(CONV, 0) == 0


def test_what_no_roofline_fits_is_interpolated() -> None:
    class Odd(Formula):
        def layer(self, shape: LayerShape, rows: int) -> float:  # each kind of layer at a rate of its own
            return super().layer(shape, rows) * (9.0 if shape.kind == "linear" else 1.0)

    timer = Odd()
    found = calibrate(layers(*SHAPES), CPU, torch.float32, timer=timer)
    assert found.model == "interpolated"
    for shape, points in found.points.items():
        for rows, measured in points:
            assert found.microseconds(shape, rows) == pytest.approx(measured)
    assert found.microseconds(CONV, 8192) > found.microseconds(CONV, 4096)


def test_a_layer_that_was_not_measured_is_predicted_by_the_roofline() -> None:
    found = calibrate(layers(*SHAPES), CPU, torch.float32, timer=Formula())
    other = LayerShape("linear", 100, 100)
    assert found.microseconds(other, 500) == found.roofline.at(other, 500, 4)


def test_one_point_of_one_layer_is_enough_to_predict() -> None:
    found = calibrate(layers(CONV, most=4), CPU, torch.float32, timer=Formula())
    assert [rows for rows, _ in found.points[CONV]] == [4]
    assert found.held_out == {}
    assert 0 < found.microseconds(CONV, 2) <= found.microseconds(CONV, 4) <= found.microseconds(CONV, 40)


def test_json_round_trip() -> None:
    found = calibrate(layers(*SHAPES), CPU, torch.float32, timer=Formula(wave=256))
    text = json.dumps(found.to_dict())
    again = Calibration.from_dict(json.loads(text))
    assert again == found
    assert json.dumps(again.to_dict()) == text
    assert again.microseconds(CONV, 1000) == found.microseconds(CONV, 1000)


@pytest.mark.parametrize("data", [{}, {"points": 3}, {"points": [{"kind": "linear", "width": 3, "points": []}]}])
def test_json_that_is_no_calibration(data: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"give what Calibration\.to_dict wrote"):
        Calibration.from_dict(data)


def test_a_device_that_computes_nothing() -> None:
    with pytest.raises(ValueError, match="'meta' is none that computes: choose 'pixel' or 'paper'"):
        calibrate(layers(CONV), torch.device("meta"), torch.float32)


def test_a_process_measures_a_layer_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    timer = Formula()
    monkeypatch.setattr(calibration_module, "_calibrations", {})
    monkeypatch.setattr(calibration_module, "LayerTimer", lambda device, dtype: timer)
    with caplog.at_level(logging.INFO, "fisedit_compile.cost_model.calibration"):
        first = calibrate(layers(CONV, most=64), CPU, torch.float32)
        calls = timer.calls
        assert calibrate(layers(CONV, most=64), CPU, torch.float32) is first
        both = calibrate(layers(CONV, LINEAR, most=64), CPU, torch.float32)
    assert set(both.points) == {CONV, LINEAR}
    assert both.points[CONV] == first.points[CONV]
    assert timer.calls == calls + len(both.points[LINEAR])
    assert caplog.text.count("timed 1 layers on ") == 2
    assert set(calibrate(layers(LINEAR), CPU, torch.float64).points) == {LINEAR}


def test_large_layers_are_cut_short_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_module, "_calibrations", {})
    monkeypatch.setattr(calibration_module, "LayerTimer", lambda device, dtype: Formula())
    found = calibrate(layers(CONV, most=10**5), CPU, torch.float32)
    assert len(found.points[CONV]) == 1
    assert found.microseconds(CONV, 10**5) > 10 * found.microseconds(CONV, 2000)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 100])
def test_every_layer_runs_on_the_cpu(shape: LayerShape, rows: int) -> None:
    timer = LayerTimer(CPU, torch.float32)
    assert timer.layer(shape, rows) > 0
    assert timer.layer(shape, 0) == timer.fetch(8, 0) == 0
    assert timer.fetch(8, rows) > 0


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
@pytest.mark.parametrize("taps", [1, 9, 15])
def test_tables_of_timed_convolutions_name_what_is_there(rows: int, taps: int) -> None:
    table, halo = square_table(rows, taps)
    assert table.shape == (rows, taps)
    assert table.dtype == torch.int32
    assert -1 <= table.min() <= table.max() < rows + halo
    assert torch.equal(table[:, taps // 2], torch.arange(rows, dtype=torch.int32))


@pytest.mark.parametrize("attention", ["full", "masked"])
def test_the_layers_of_a_program(unets: UNets, attention: str) -> None:
    sparse = unets.sparse("micro", torch.float32, attention, 4)
    program = sparse.program(unets.call(sparse, "micro", 2, (16, 12)))
    found = row_layers(program.lowered)
    assert {layer.size for layer in found} == {(16, 12), (8, 6)}
    by_path = {layer.path: layer for layer in found}
    first = by_path["conv_in"]
    assert (first.shape, first.size, first.most, first.halo) == (
        LayerShape("convolution", 4, 16, taps=9), (16, 12), 2 * 16 * 12, None,
    )  # fmt: skip
    down = by_path["down_blocks.0.downsamplers.0.conv"]
    assert (down.shape, down.size, down.most, down.halo) == (
        LayerShape("convolution", 16, 16, taps=9), (8, 6), 2 * 8 * 6, (16, 12),
    )  # fmt: skip
    kinds = {layer.shape.kind for layer in found}
    own = "cached_attention" if attention == "full" else "self_attention"
    assert kinds == {"convolution", "linear", "text_attention", own}
    attentions = [layer.shape for layer in found if layer.shape.kind == own]
    assert {shape.keys for shape in attentions} == ({16 * 12, 8 * 6} if attention == "full" else {0})
    assert any(layer.shape.geglu for layer in found)


def test_work_is_what_the_mac_counter_counts(unets: UNets) -> None:
    from fisedit_compile.macs.counter import MacCounter

    sparse = unets.sparse("micro", torch.float32, "full", 4)
    program = sparse.program(unets.call(sparse, "micro", 2, (16, 12)))
    counter = MacCounter(program.lowered, check=False)
    mask = square_mask(0.2, (16, 12))
    plan, counted = counter.plan(mask), counter.step(counter.plan(mask)).by_resolution
    for size, rows in plan.counts.items():
        own = sum(layer.shape.macs(rows) for layer in row_layers(program.lowered) if layer.size == size)
        assert own == counted["{}x{}".format(*size)]


def test_measured_blocks_of_a_sparse_unet(unets: UNets, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = unets.sparse("micro", torch.float64, "full", 4)
    sparse = sparsify(exact.unet, dataclasses.replace(exact.sparsity, blocks="measured"))
    base, call = unets.recorded(exact, "micro", 1, (16, 12)), unets.call(exact, "micro", 1, (16, 12), 1)
    program = sparse.program(call)
    found = calibrate(row_layers(program.lowered), CPU, torch.float64, timer=Formula())
    costs = RowCosts(tuple(row_layers(program.lowered)), found)
    monkeypatch.setattr(RowCosts, "of", lambda program: costs)
    mask = square_mask(0.2, (16, 12))
    prepared = sparse.prepare(call, mask)
    assert program.row_costs is costs
    for size, choice in prepared.plan.cost_choices.items():
        assert choice.chosen.microseconds == min(each.microseconds for each in choice.candidates)
        assert prepared.plan.counts[size] == choice.chosen.rows
        assert choice.chosen.microseconds == pytest.approx(costs(size, choice.chosen.rows, choice.chosen.halo))
    out = sparse.step(base.call, base.cache, prepared)
    assert torch.allclose(out, base.out, atol=1e-9)


def test_a_unet_on_meta_cannot_be_measured(unets: UNets) -> None:
    from fisedit_compile.macs.counter import count_macs

    with pytest.raises(ValueError, match="blocks='measured' times layers on the device"):
        count_macs(unets.fresh("micro").to("meta"), height=128, width=128, edit_size=0.2, config={"blocks": "measured"})


class TestCommand:
    def test_table_and_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        masks = np.zeros((3, 16, 16), dtype=bool)
        masks[0, :5, :5] = masks[2, 3:9, 2:13] = True
        np.savez(tmp_path / "masks.npz", masks=masks)
        arguments = ["blocks", "--arch", "tiny", "--size", "128", "--edit-size", "0.1", "--device", "cpu"]
        arguments += ["--masks", str(tmp_path / "masks.npz"), "--json", str(tmp_path / "out.json")]
        assert main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        result = json.loads((tmp_path / "out.json").read_text())
        assert lines[0] == "tiny, image 128x128, batch 2, full attention"
        assert Calibration.from_dict(result["calibration"]).dtype == "float32"
        assert {row["masks"] for row in result["rows"]} == {"square 9.8%", "masks.npz 17.8%, 2 masks"}
        assert [row["choice"] for row in result["rows"]] == ["pixel", "paper", "whole", "measured"] * 2
        assert len(lines) == 4 + 1 + 2 * (4 + 4)  # what it is, the heads, and for each set of masks 16x16 and all
        for row in result["rows"]:
            own = [other for other in result["rows"] if other["masks"] == row["masks"]]
            assert row["size"] == [16, 16]
            assert row["predicted"] >= own[3]["predicted"]
            assert row["measured"] > 0
            assert len(row["outcomes"]) == (1 if row["masks"].startswith("square") else 2)
            layers_sum = sum(each["count"] * each["measured"] for each in row["layers"])
            assert layers_sum <= row["measured"] * (1 + 1e-9)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--arch", "sd2", "--device", "cpu"], "on the CPU: timing its layers takes minutes"),
            (["--arch", "tiny9", "--device", "cpu"], "--arch tiny9: choose one of tiny"),
            (["--arch", "tiny", "--device", "cpu", "--masks", "none.npz"], "none.npz"),
            (["--arch", "tiny", "--device", "cpu", "--json", "no/such/folder/out.json"], "there is no folder"),
        ],
    )
    def test_bad_input(self, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["blocks", *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_predictions_on_the_gpu_are_near_what_is_measured() -> None:
    from fisedit_compile.architectures import build_unet, unet_inputs

    device, dtype = torch.device("cuda"), torch.bfloat16
    unet = build_unet("sd15", device="meta", dtype=dtype)
    args, kwargs = unet_inputs(unet, batch=2, height=512, width=512)
    sparse = sparsify(unet, {})
    found = tuple(
        layer for layer in row_layers(sparse.program(sparse.call(*args, **kwargs)).lowered) if layer.size == (64, 64)
    )
    costs = RowCosts(found, calibrate(found, device, dtype))
    timer = LayerTimer(device, dtype)
    assert min(costs.calibration.held_out.values()) < 0.25
    shapes, channels = costs.work((64, 64))
    for rows in (410, 1230, 2460, 8192):
        measured = sum(n * timer.layer(shape, rows) for shape, n in shapes.items()) + timer.fetch(channels, 100)
        assert costs((64, 64), rows, 100) == pytest.approx(measured, rel=0.25)
