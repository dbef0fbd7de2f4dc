"""Benchmarks of edits: what is exchanged between a base and a dense edit, and times that add up."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pipelines import CONFIG, EDIT, generate, left_half, tiny_pipeline

from fisedit_compile import Editor

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", ["error_parts.py"])
    return runpy.run_path(str(BENCHMARKS / "error_parts.py"))


def test_with_all_of_the_dense_edit_s_values_a_sparse_edit_is_the_dense_one(benchmark: dict[str, Any]) -> None:
    editor = Editor(tiny_pipeline(), {**CONFIG, "cross_replace": 0.0, "cache": "exact", "dense_above": 1.0})
    base, mask = generate(editor), left_half()[None]
    before = editor.edit(base, EDIT, mask).latents
    variant = benchmark["Variant"]
    benchmark["VARIANTS"] |= {
        "all": variant(("statistics", "maps", "keys, values")),
        "rest": variant(("maps", "keys, values"), step=lambda step: step),
    }
    found = dict(zip(benchmark["VARIANTS"], benchmark["similarities"](editor, base, EDIT, mask), strict=True))
    assert found["all"] == pytest.approx(1, abs=1e-3)
    assert found["rest"] == pytest.approx(1, abs=1e-3)  # statistics, changed as they were at the same step
    assert found["as it was"] < found["all"]
    assert torch.equal(editor.edit(base, EDIT, mask).latents, before)  # nothing stays exchanged


def test_the_parts_of_an_edit_add_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = runpy.run_path(str(BENCHMARKS / "edit_timeline.py"))["main"]
    run(["--size", "128", "--steps", "6", "--edit-size", "0.2", "--repeats", "1"])
    whole, *parts = map(float, capsys.readouterr().out.splitlines()[-1].split()[1:])
    assert min(parts) > 0
    assert sum(parts) == pytest.approx(whole, abs=0.2)
