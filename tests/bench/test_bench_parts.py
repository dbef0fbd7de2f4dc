"""What benchmarks measure with: masks, timing, dense baselines, profiles, the preparation of an edit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.unets import UNets

from fisedit_compile.bench import timing
from fisedit_compile.bench.gpu_counters import count_kernels, dynamo_graphs
from fisedit_compile.bench.masks import MaskSet, scattered_squares
from fisedit_compile.bench.timing import Spread, interleaved
from fisedit_compile.bench.unet.dense import dense_runs
from fisedit_compile.bench.unet.preparation import measure_prep
from fisedit_compile.masks.sample_masks import square_mask

CPU = torch.device("cpu")


class TestMasks:
    def test_square(self) -> None:
        square = MaskSet.square(0.1, (16, 16))
        assert (square.edit_size, square.active, square.source) == (0.1, 5 * 5 / 16**2, "square")

    def test_packed_file(self, tmp_path: Path) -> None:
        masks = np.random.default_rng(0).random((5, 8, 8)) < 0.3
        masks[3] = False
        np.savez(tmp_path / "packed.npz", packed=np.packbits(masks.reshape(5, -1), axis=1))
        read = MaskSet.of_file(tmp_path / "packed.npz", (8, 8), most=10)
        assert read.empty == 1
        assert [mask[0].tolist() for mask in read.masks] == masks[[0, 1, 2, 4]].tolist()
        assert read.edit_size == read.active == pytest.approx(masks[[0, 1, 2, 4]].mean())

    def test_evenly_spaced_and_pooled(self, tmp_path: Path) -> None:
        masks = np.zeros((9, 4, 4), bool)
        masks[np.arange(9), 0, 0] = True
        masks[8] = True
        np.savez(tmp_path / "masks.npz", masks=masks)
        read = MaskSet.of_file(tmp_path / "masks.npz", (2, 2), most=2)
        assert [int(mask.sum()) for mask in read.masks] == [1, 4]
        assert read.edit_size == read.active == 0.625

    def test_only_empty_masks(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "masks.npz", masks=np.zeros((2, 4, 4), bool))
        with pytest.raises(ValueError, match="none of the 2 masks"):
            MaskSet.of_file(tmp_path / "masks.npz", (4, 4), most=2)

    @pytest.mark.parametrize("size", [(96, 96), (12, 40)])
    def test_scattered_squares_are_the_square_at_different_places(self, size: tuple[int, int]) -> None:
        squares = scattered_squares(0.15, size, 4)
        assert {int(square.sum()) for square in squares} == {int(square_mask(0.15, size).sum())}
        assert len({tuple(square.flatten().tolist()) for square in squares}) == 4

    def test_there_is_one_place_for_everything(self) -> None:
        assert all(bool(square.all()) for square in scattered_squares(1.0, (8, 8), 3))


class TestTiming:
    def test_alternatives_take_turns(self) -> None:
        order: list[str] = []
        runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
        times = interleaved(runs, repeats=2, warmup=1, device=CPU, label="")
        assert "".join(order) == "ababab"
        assert {name: len(each.steady) for name, each in times.items()} == {"a": 2, "b": 2}
        assert times["a"].latency == times["a"].steady
        assert times["a"].host_ms is None

    def test_fewer_repeats_are_spread_over_the_rounds(self) -> None:
        order: list[str] = []
        runs = {name: (lambda name=name: order.append(name)) for name in "ab"}
        times = interleaved(runs, repeats={"a": 6, "b": 2}, warmup=1, device=CPU, label="")
        assert "".join(order) == "ab" + "aaab" + "aaab"
        assert len(times["b"].steady) == 2

    @pytest.mark.parametrize(("milliseconds", "calls"), [(30.0, 2), (4.0, 3), (2.5, 4), (0.001, 64), (0.0, 64)])
    def test_a_sample_takes_ten_milliseconds(self, milliseconds: float, calls: int) -> None:
        assert timing.calls_of_sample(milliseconds) == calls

    def test_a_sample_on_cuda_is_of_calls_in_a_row(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a clock that a call moves by 4 ms; the device's own is the same one."""
        clock, log = [0.0], []

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                self.at = 0.0

            def record(self) -> None:
                self.at = clock[0]
                log.append("|")

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        def run() -> None:
            clock[0] += 4.0
            log.append("x")

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0] / 1e3)
        device: Any = SimpleNamespace(type="cuda")
        times = interleaved({"a": run}, repeats=2, warmup=1, device=device, label="")["a"]
        assert "".join(log) == "|x|" + 2 * "x|xxx|" + 2 * "|x|"
        assert times.calls == 3
        assert times.steady == times.latency == [pytest.approx(4)] * 2
        assert times.host_ms == pytest.approx(4)

    def test_spread(self) -> None:
        assert Spread.of([float(i) for i in range(11)]) == Spread(median=5, p10=1, p90=9)


class Double(torch.nn.Module):
    """Takes what a U-Net takes, as far as a dense call goes."""

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> tuple[torch.Tensor]:
        return (2 * sample,)


class TestDense:
    def test_each_mode_is_compiled_by_itself_and_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compiled: list[dict[str, Any]] = []
        called: list[int] = []

        def compile_fx(graph: Any, inputs: Any, config_patches: Any = None, **_: Any) -> Any:
            compiled.append(config_patches or {})
            number = len(compiled)
            return lambda *args: (called.append(number), graph.forward(*args))[1]

        monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
        unet, args = Double(), (torch.ones(2),)
        names = ["eager", "compile", "reduce-overhead", "max-autotune-no-cudagraphs"]
        with torch.no_grad():
            dense = dense_runs(unet, args, {}, names, CPU)
            before = dynamo_graphs()
            called.clear()
            for run in (*dense.runs.values(), *reversed(dense.runs.values())):
                run()
        assert list(dense.runs) == names
        assert dense.compiled == names[1:] == list(dense.compile_seconds)
        assert [patches.get("triton.cudagraphs", False) for patches in compiled] == [False, True, False]
        assert [patches.get("max_autotune", False) for patches in compiled] == [False, False, True]
        assert called == [1, 2, 3, 3, 2, 1]
        assert dynamo_graphs() == before

    def test_a_mode_that_fails_is_left_out_and_named(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def no_compile(*_: Any, **__: Any) -> Any:
            raise RuntimeError("no compiler\nand more")

        monkeypatch.setattr(torch, "compile", no_compile)
        unet, args = Double(), (torch.ones(2),)
        dense = dense_runs(unet, args, {}, ["eager", "compile"], CPU)
        assert (list(dense.runs), dense.failed) == (["eager"], {"compile": "RuntimeError: no compiler"})
        assert "left out" in capsys.readouterr().err
        with pytest.raises(ValueError, match="add eager"):
            dense_runs(unet, args, {}, ["compile"], CPU)


def test_kernels_are_counted_on_a_gpu_alone() -> None:
    assert count_kernels(lambda: pytest.fail("ran"), CPU) is None


@pytest.mark.gpu
def test_kernels_of_a_call() -> None:
    x, device = torch.randn(64, 64, device="cuda"), torch.device("cuda")
    torch.sin(x)
    assert count_kernels(lambda: torch.cos(torch.sin(x).copy_(x)), device) == 2  # and a copy


def test_prep_of_several_edits(unets: UNets) -> None:
    sparse = unets.sparse("micro")
    base = unets.recorded(sparse, "micro", 2, (16, 16))
    prep = measure_prep(sparse, base.call, base.cache, scattered_squares(0.2, (16, 16), 3), CPU)
    assert prep["plan_ms"] > 0
    assert prep["prep_ms"] == pytest.approx(prep["plan_ms"] + prep["upload_ms"] + prep["prompt_ms"])
