"""What becomes of a benchmark's rows: the crossover, the table and the plot."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fisedit_compile.bench.unet.curve import crossover, curves, line
from fisedit_compile.bench.unet.table import summary, table

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))  # as Python does for a script that lies there

import plot_edit
import plot_unet


def row(**values: Any) -> dict[str, Any]:
    """A row as ``bench unet`` makes it."""
    return {
        "edit_size": 0.05,
        "active": 0.05,
        "masks": {"source": "square", "used": 1, "empty": 0},
        "attention": "full",
        "dense_ms": {"compile": 100.0},
        "sparse_ms": 12.5,
        "speedup": {"compile": 8.0},
        "fastest_compiled": "compile",
        "speedup_compiled": 8.0,
        "macs": {"dense": 40_000_000_000, "sparse": 4_000_000_000, "ratio": 10.0},
        "prep_ms": None,
        "captures": 0,
        "recompiles": 0,
        **values,
    }


def grown(count: int = 5) -> list[dict[str, Any]]:
    """Rows of 0.2 to 1.0 whose sparse time grows from 4 to 20 ms."""
    return [row(active=i / count, sparse_ms=20 * i / count, dense_ms={"compile": 10.0}) for i in range(1, count + 1)]


class TestCurve:
    def test_crossover_is_interpolated(self) -> None:
        curve = [(0.1, 2.0), (0.5, 8.0), (1.0, 18.0)]
        assert crossover(curve, 10.0) == pytest.approx(0.6)
        assert crossover(curve, 8.0) == pytest.approx(0.5)

    @pytest.mark.parametrize("dense_ms", [1.0, 20.0])
    def test_no_crossover(self, dense_ms: float) -> None:
        assert crossover([(0.1, 2.0), (0.5, 8.0), (1.0, 18.0)], dense_ms) is None

    def test_line(self) -> None:
        assert line([(0.0, 1.0), (0.5, 2.0)]) is None
        fitted = line([(0.1, 1.2), (0.5, 2.0), (1.0, 3.0)])
        assert fitted == {
            "ms_of_nothing": pytest.approx(1),
            "ms_of_everything": pytest.approx(3),
            "r2": pytest.approx(1),
        }

    def test_curves_leave_out_real_masks(self) -> None:
        rows = [*grown(), row(active=0.3, sparse_ms=99.0, masks={"source": "m.npz", "used": 9, "empty": 0})]
        assert curves(rows)["crossover"] == {"full": pytest.approx(0.5)}


class TestTable:
    def test_shows_what_was_measured(self) -> None:
        heads, cells = table([row()]).splitlines()
        assert " ".join(heads.split()) == (
            "edit size attention compile ms sparse ms x compiled dense GMAC sparse GMAC ratio"
        )
        assert cells.split() == ["5.0%", "full", "100.00", "12.50", "8.00", "40.0", "4.0", "10.00"]

    def test_columns_of_a_gpu(self) -> None:
        values = {"tflops": {"sparse": 321.4}, "launches": {"sparse": 300}, "prep_ms": 7.25, "recording_peak_mb": 512.0}
        heads, cells = table([row(**values)]).splitlines()
        assert heads.split()[-6:] == ["TFLOP/s", "launches", "prep", "ms", "peak", "MB"]
        assert cells.split()[-4:] == ["321", "300", "7.2", "512"]

    def test_summary(self) -> None:
        batched = {"edits": 4, "ms": 10.0, "ms_one_at_a_time": 12.0, "throughput_ratio": 1.2}
        result = {"rows": [row(batched=batched, captures=1)], "crossover": {"full": 0.62}, "failed": {"x": "why"}}
        lines = summary(result)
        for words in (
            "fastest of those measured, compile",
            "(1.20x)",
            "from 62%",
            "left out: x (why)",
            "captured while",
        ):
            assert words in lines


class TestPlot:
    def result(self) -> dict[str, Any]:
        real = row(
            active=0.23, sparse_ms=6.0, dense_ms={"compile": 10.0}, masks={"source": "m.npz", "used": 9, "empty": 1}
        )
        rows = [*grown(), real, *(each | {"attention": "masked"} for each in grown())]
        conditions = {"arch": "sd2", "size": 768, "batch": 2, "dtype": "bfloat16", "device_name": "GPU"}
        return {**conditions, "versions": {"torch": "2.11"}, "rows": rows, **curves(rows)}

    def test_says_conditions_crossover_and_real_masks(self, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        (tmp_path / "sd2.json").write_text(json.dumps(self.result()))
        out = tmp_path / "plot.svg"
        assert plot_unet.main([str(tmp_path / "sd2.json"), "--out", str(out)]) == 0
        svg = out.read_text()
        words = ("SD 2.1, 768x768, batch 2, bfloat16", "GPU, torch 2.11", "dense, compiled: 10.0 ms", "50%")
        for text in (*words, "mean of 9 real masks, full"):
            assert f"<!-- {text} -->" in svg

    def test_an_eager_call_far_above_all_else_is_named_and_presses_nothing_down(self) -> None:
        pyplot = pytest.importorskip("matplotlib.pyplot")
        result = self.result()
        _, (without, beside) = pyplot.subplots(1, 2)
        plot_unet.draw_panel(without, result)
        for each in result["rows"]:
            each["dense_ms"] = {**each["dense_ms"], "eager": 100.0}
        plot_unet.draw_panel(beside, result)
        assert beside.get_ylim() == without.get_ylim()
        assert "dense, eager: 100.0 ms, above" in [text.get_text() for text in beside.texts]
        pyplot.close()

    @pytest.mark.parametrize("text", ["no json", "{}", '{"arch": "sd2", "size": 768, "rows": []}'])
    def test_bad_file(self, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "bad.json").write_text(text)
        assert plot_unet.main([str(tmp_path / "bad.json"), "--out", str(tmp_path / "p.svg")]) == 2
        assert "plot_unet: error" in capsys.readouterr().err


class TestPlotOfEdits:
    @pytest.mark.parametrize("file", ["edit_sd2_768_h200.json", "edit_sdxl_1024_h200.json"])
    def test_parts_add_up_and_speed_ups_are_said(self, file: str, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib")
        path = Path(plot_edit.__file__).parent / "results" / file
        result = json.loads(path.read_text())
        for each in result["rows"]:
            assert sum(plot_edit.parts_of(each, result).values()) == pytest.approx(each["edit_ms"])
        assert plot_edit.main([str(path), "--out", str(tmp_path / "plot.svg")]) == 0
        svg, first = (tmp_path / "plot.svg").read_text(), result["rows"][0]
        ratio = result["compiled_ms"][str(result["steps"])] / first["edit_ms"]
        assert f"{first['edit_ms']:.0f} ms, {ratio:.1f}x" in svg

    def test_a_file_of_something_else(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "other.json").write_text("[]")
        assert plot_edit.main([str(tmp_path / "other.json"), "--out", str(tmp_path / "plot.svg")]) == 2
        assert "is not of fisedit-compile bench edit" in capsys.readouterr().err
