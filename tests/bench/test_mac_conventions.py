"""The script that lays candidates beside the paper's figure: its sums, with round numbers in place of the models."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fisedit_compile.macs.report import MacCount

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "mac_conventions.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("mac_conventions", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "once_an_image", lambda: (5000, 500))
    return module


def test_candidates(script: Any) -> None:
    unet = MacCount({"convolution": 600, "linear": 200, "attention": 400}, {}, {})
    found = [macs for _, macs in script.candidates(unet)]
    assert found == [1200, 1224, 1300, 1310, 800, 816, 900, 910, 1000, 1020, 1100, 1110, 600, 400, 500, 1000, 5000, 500]
