"""The tests that docs/service.md names are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_each_fault_has_its_test() -> None:
    page = (ROOT / "docs" / "service.md").read_text()
    table = page.partition("## What can go wrong")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    there = "".join(path.read_text() for path in (ROOT / "tests" / "serving").glob("test_*.py"))
    for row in rows:
        named = re.findall(r"`(?:Test\w+::)?(test_\w+)`", row.rpartition(" | ")[2])
        assert named or "---" in row, row
        assert all(f"def {name}(" in there for name in named), row
