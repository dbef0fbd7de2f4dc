"""Print what the README says in figures, from the files in ``benchmarks/results``.

    python benchmarks/readme_table.py

Prints the figure at the top of the README and its table, in Markdown, to be pasted when a result has been measured
anew; a test holds the README to them. All speed-ups of U-Net calls are against the fastest compiled dense U-Net of the
same run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"

#: Of the rows of U-Net calls: what was measured, its file, its unit and the milliseconds in it.
CALLS = (
    ("SD 2.1, 768x768, one U-Net call, H200", "sd2_768_h200.json", "ms", 1.0),
    ("SD 1.5, 512x512, one U-Net call, H200", "sd15_512_h200.json", "ms", 1.0),
    ("SDXL, 1024x1024, one U-Net call, H200", "sdxl_1024_h200.json", "ms", 1.0),
    ("SD 1.5, 512x512, one U-Net call, two cores", "sd15_512_cpu.json", "s", 1000.0),
)
#: Whole edits, beside the compiled pipeline of as many steps as the base has.
EDITS = (
    ("SD 2.1, 768x768, a whole edit, 50 steps, H200", "edit_sd2_768_h200.json"),
    ("- the same, all 50 steps visited", "edit_sd2_768_stride1_h200.json"),
    ("- another run, with real masks", "edit_sd2_768_real_h200.json"),
    ("SD 2.1, 768x768, a whole edit, 20 steps, H200", "edit_sd2_768_dpm20_h200.json"),
    ("SD 2.1, 768x768, 8 steps without guidance, H200", "edit_sd2_768_8steps_h200.json"),
    ("SD 1.5, 512x512, a whole edit, 50 steps, H200", "edit_sd15_512_h200.json"),
    ("SDXL, 1024x1024, a whole edit, 30 steps, H200", "edit_sdxl_1024_h200.json"),
)

ATTENTION = "full"
HEADS = ("", "compiled dense", "5 %", "15 %", "30 %", "real masks")


def headline() -> str:
    """The one figure at the top: a call of SD 2.1 that recomputes 5 % of the picture."""
    result = _read(CALLS[0][1])
    row = next(row for row in result["rows"] if row["attention"] == ATTENTION and row["edit_size"] == 0.05)
    dense = _compiled_ms(row)
    return (
        f"**{dense / row['sparse_ms']:.1f} times as fast** as the fastest `torch.compile`: {row['sparse_ms']:.1f} ms "
        f"instead of {dense:.1f}"
    )


def table() -> str:
    """The table of figures, in Markdown."""
    lines = [*(_call_line(*call) for call in CALLS), *(_edit_line(*edit) for edit in EDITS)]
    return tabulate(lines, HEADS, tablefmt="github", disable_numparse=True)


def _call_line(title: str, file: str, unit: str, scale: float) -> list[str]:
    rows = [row for row in _read(file)["rows"] if row["attention"] == ATTENTION]
    squares = {row["edit_size"]: row for row in rows if row["masks"]["source"] == "square"}
    real = [row for row in rows if row["masks"]["source"] != "square"]
    cells = [title, f"{_compiled_ms(rows[0]) / scale:#.3g} {unit}"]
    for size in (0.05, 0.15, 0.30):
        nearest = min(squares, key=lambda measured: abs(measured - size))
        cells.append(_cell(squares[nearest], unit, scale) + _note(nearest, size))
    return [*cells, _cell(real[0], unit, scale) + _share(real[0]) if real else "-"]


def _edit_line(title: str, file: str) -> list[str]:
    result = _read(file)
    dense = result["compiled_ms"][str(result["steps"])]
    edits = {row["edit_size"]: row["edit_ms"] for row in result["rows"] if row["source"] == "square"}
    real = [row for row in result["rows"] if row["source"] != "square"]
    cells = []
    for size in (0.05, 0.15, 0.30):
        near = min(edits, key=lambda measured: abs(measured - size))
        shown = f"{edits[near]:.0f} ms, {dense / edits[near]:.1f}x" + _note(near, size)
        cells.append(shown if abs(near - size) < 0.06 else "-")
    of_real = [f"{row['edit_ms']:.0f} ms, {dense / row['edit_ms']:.1f}x{_share(row)}" for row in real]
    return [title, f"{dense:.0f} ms", *cells, *(of_real or ["-"])]


def _note(measured: float, size: float) -> str:
    """What is said of a cell that is of another size than its column."""
    return "" if measured == size else f" at {measured:.0%}".replace("%", " %")


def _share(row: dict[str, Any]) -> str:
    """What is said of real masks: the share of the picture that they cover."""
    return f" at {row['active']:.0%}".replace("%", " %")


def _cell(row: dict[str, Any], unit: str, scale: float) -> str:
    milliseconds = row["sparse_ms"]
    return f"{milliseconds / scale:#.3g} {unit}, {_compiled_ms(row) / milliseconds:.1f}x"


def _compiled_ms(row: dict[str, Any]) -> float:
    """The fastest compiled dense U-Net of a row's run."""
    return min(ms for name, ms in row["dense_ms"].items() if name != "eager")


def _read(file: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((RESULTS / file).read_text())
    return result


if __name__ == "__main__":
    print(headline(), table(), sep="\n\n")
