"""``fisedit-compile bench`` on a very small U-Net: rows, files and refusals; its parts are in test_bench_parts.py."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support.unets import MICRO

from fisedit_compile.architectures import ARCHITECTURES
from fisedit_compile.bench.startup.stages import stages
from fisedit_compile.bench.unet import measure as bench_unet
from fisedit_compile.cli import bench_start, main


@pytest.fixture(autouse=True)
def _micro(monkeypatch: pytest.MonkeyPatch) -> None:
    """``--arch micro``: two resolutions, captured in under a second."""
    monkeypatch.setitem(ARCHITECTURES, "micro", MICRO)


def bench(*options: str) -> int:
    return main(["bench", "unet", "--arch", "micro", "--device", "cpu", "--baseline", "eager", *options])


def write_masks(path: Path) -> Path:
    """Of three masks one that is empty."""
    masks = np.zeros((3, 16, 16), bool)
    masks[0, :4, :4] = masks[2, :8, :8] = True
    np.savez(path, masks=masks)
    return path


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[str], str]:
    """File, lines of stdout, and command of one benchmark with everything that the CPU has."""
    folder = tmp_path_factory.mktemp("bench")
    masks, file = write_masks(folder / "masks.npz"), folder / "bench.json"
    command = f"bench unet --arch micro --size 256 --edit-size 0.1 0.3 0.5 --masks {masks} --edits 2 --baseline eager"
    command += f" --repeats 2 --device cpu --json {file}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "micro", MICRO)
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, file=None, **_: file or printed.extend(words[0].splitlines()))
        assert main(command.split()) == 0
    return json.loads(file.read_text()), printed, command


class TestUnet:
    def test_the_file_says_what_was_run(self, measured: tuple[dict[str, Any], list[str], str]) -> None:
        result, _, command = measured
        assert (result["arch"], result["size"], result["batch"], result["dtype"]) == ("micro", 256, 2, "float32")
        assert result["command"] == f"fisedit-compile {command}"
        assert result["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
        assert result["threads"] == torch.get_num_threads()
        rows = [(row["attention"], row["edit_size"]) for row in result["rows"]]
        assert rows == [(mode, size) for mode in ("masked", "full") for size in (0.1, 0.3, 0.5, 40 / 256)]
        assert set(result["first_steps"]) == set(result["line"]) == set(result["crossover"]) == {"masked", "full"}
        assert result["first_steps"]["full"]["capture_seconds"] > 0

    def test_figures_of_a_row_fit_each_other(self, measured: tuple[dict[str, Any], list[str], str]) -> None:
        rows = measured[0]["rows"]
        for row in rows:
            assert row["speedup"]["eager"] == pytest.approx(row["dense_ms"]["eager"] / row["sparse_ms"])
            macs = row["macs"]
            assert macs["ratio"] == pytest.approx(macs["dense"] / macs["sparse"])
            assert row["tflops"]["sparse"] == pytest.approx(2 * macs["sparse"] / (row["sparse_ms"] * 1e-3) / 1e12)
            for which, middle in (("eager", row["dense_ms"]["eager"]), ("sparse", row["sparse_ms"])):
                assert row["p10_ms"][which] <= middle * (1 + 1e-9)
                assert row["p90_ms"][which] >= middle * (1 - 1e-9)
                assert row["latency_ms"][which] == pytest.approx(middle)  # a sample is one call
            assert row["captures"] == row["recompiles"] == 0
            assert row["plan_ms"] > 0
        small, middle, large, real = rows[:4]
        assert small["macs"]["sparse"] < middle["macs"]["sparse"] < large["macs"]["sparse"] < large["macs"]["dense"]
        assert real["masks"] == {"source": "masks.npz", "used": 2, "empty": 1}
        assert rows[4]["macs"]["sparse"] > small["macs"]["sparse"]  # all keys are more work than masked ones

    def test_what_only_a_gpu_has_is_none(self, measured: tuple[dict[str, Any], list[str], str]) -> None:
        row = measured[0]["rows"][0]
        assert row["launches"] == row["host_ms"] == {"eager": None, "sparse": None}
        assert row["prep_ms"] is row["upload_ms"] is row["recording_peak_mb"] is None
        assert row["bucket"] == []
        assert row["fastest_compiled"] is row["speedup_compiled"] is None

    def test_batched_edits(self, measured: tuple[dict[str, Any], list[str], str]) -> None:
        rows = measured[0]["rows"]
        assert "batched" not in rows[3]  # its masks are of no one size
        for row in (*rows[:3], *rows[4:7]):
            batched = row["batched"]
            assert batched["edits"] == 2
            assert batched["throughput_ratio"] == pytest.approx(batched["ms_one_at_a_time"] / batched["ms"])

    def test_the_table_has_a_line_a_row(self, measured: tuple[dict[str, Any], list[str], str]) -> None:
        result, lines, _ = measured
        assert lines[0].startswith("256x256, micro, batch 2, float32")
        assert lines[1].split()[:4] == ["edit", "size", "attention", "eager"]
        assert [line.split()[0] for line in lines[2:10]] == 2 * ["10.0%", "30.0%", "50.0%", "15.6%"]
        assert sum("2 edits of" in line for line in lines[10:]) == 6
        assert len(result["rows"]) == 8

    def test_rows_are_kept_when_a_later_mode_fails(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        measure = bench_unet.SparseRuns.measure

        def fail(self: Any, dense: Any) -> Any:
            if self.attention == "full":
                raise OSError("cut off")
            return measure(self, dense)

        monkeypatch.setattr(bench_unet.SparseRuns, "measure", fail)
        file = tmp_path / "bench.json"
        assert bench("--edit-size", "0.2", "--repeats", "1", "--json", str(file)) == 2
        assert [row["attention"] for row in json.loads(file.read_text())["rows"]] == ["masked"]

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            (("--arch", "sd9"), "choose one of tiny"),
            (("--size", "100"), "multiple of 8"),
            (("--masks", __file__), "no .npz of masks"),
            (("--json", "no/such/folder/bench.json"), "there is no folder"),
            (("--json", "."), "that is a folder"),
        ],
    )
    def test_bad_input_is_refused_before_anything_runs(
        self,
        options: tuple[str, ...],
        reason: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(bench_unet, "build_unet", None)
        assert bench(*options) == 2
        assert reason in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "sizes"),
        [
            ((), [0.05, 0.15, 0.3]),
            (("--edit-size", "0.2"), [0.2]),
            (("--curve",), [0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
            (("--curve", "--edit-size", "0.25", "0.5"), [0.25, 0.5, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4]),
        ],
    )
    def test_edit_sizes(self, options: tuple[str, ...], sizes: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[float] = []

        def stop(settings: Any, mask_sets: Any, *_: Any, **__: Any) -> None:
            seen.extend(each.edit_size for each in mask_sets)
            raise ValueError("seen")

        monkeypatch.setattr(bench_unet, "bench_unet", stop)
        assert bench(*options) == 2
        assert seen[: len(sizes)] == sizes
        assert len(set(seen)) == len(seen)

    @pytest.mark.gpu
    def test_on_a_gpu(self, tmp_path: Path) -> None:
        file = tmp_path / "bench.json"
        command = "bench unet --arch tiny --size 256 --edit-size 0.05 0.3 --baseline eager reduce-overhead --edits 2"
        command += f" --attention full --repeats 3 --device cuda --json {file}"
        assert main(command.split()) == 0
        result = json.loads(file.read_text())
        assert result["dtype"] == "bfloat16"
        assert not result["failed"]
        assert result["compile_seconds"].keys() == {"reduce-overhead"}
        assert result["first_steps"]["full"]["captures"] >= 1
        for row in result["rows"]:
            assert row["captures"] == row["recompiles"] == 0
            assert row["fastest_compiled"] == "reduce-overhead"
            assert row["bucket"]
            for name in ("eager", "sparse"):
                assert row["host_ms"][name] > 0
                assert row["latency_ms"][name] > 0
                assert row["launches"][name] > 20
            assert row["launches"]["reduce-overhead"] is None
            assert row["peak_mb"]["sparse"] >= 0
            assert row["recording_peak_mb"] > 0
            assert row["graph_pool_mb"]["sparse"] > 0
            assert row["plan_ms"] > 0
            assert row["prep_ms"] > 0
            assert row["batched"]["ms"] > 0
        torch.rand(1, device="cuda")  # raises after a capture that was aborted


class TestStart:
    def test_table_and_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        calls: list[dict[str, str]] = []

        def run(command: list[str], *, env: dict[str, str], **_: Any) -> SimpleNamespace:
            calls.append(env)
            seconds = stages(json.loads(command[-1]), begin=0.0)
            return SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(seconds)}\n")

        monkeypatch.setattr(bench_start.subprocess, "run", run)
        file = tmp_path / "start.json"
        command = f"bench start --arch micro --size 128 --edit-size 0.2 --device cpu --json {file}"
        assert main(command.split()) == 0
        result = json.loads(file.read_text())
        assert list(result["seconds"]) == ["first", "second"]
        for seconds in result["seconds"].values():
            assert list(seconds)[-3:] == ["first step", "second step", "total"]
            assert all(each > 0 for each in seconds.values())
        caches = [env["TORCHINDUCTOR_CACHE_DIR"] for env in calls]
        assert caches[0] == caches[1]
        assert not Path(caches[0]).exists()  # the folder was temporary
        assert "filled caches" in capsys.readouterr().out

    def test_a_process_that_fails(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(bench_start.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=3, stdout=""))
        assert main(["bench", "start", "--arch", "tiny", "--device", "cpu"]) == 2
        assert "ended with status 3" in capsys.readouterr().err
