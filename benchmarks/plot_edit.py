"""Plots what whole edits spend their time on, from files of ``fisedit-compile bench edit --json``.

    fisedit-compile bench edit --arch sd2 --size 768 --device cuda --json out/edit.json
    python benchmarks/plot_edit.py out/edit.json --out out/edit.svg        # needs matplotlib: pip install '.[plot]'

Each file gets a panel with a bar for each edit, cut into its parts, and bars for the pipeline with U-Net and decoder
compiled: at the base's steps, and at as many as the edit makes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from plot_files import DOTS_PER_INCH, MODELS, run

#: The parts of an edit in their order, and their colours.
PARTS = {
    "text encoder": "#2a9d8f",
    "dense steps": "#d1495b",
    "sparse steps": "#0b5fa5",
    "decoder": "#edae49",
    "all else": "#b8b8b8",
}
_COMPILED = "#444444"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for a file that cannot be used."""
    description = "Plot what whole edits spend their time on."
    return run("plot_edit", description, bench="bench edit", keys=("parts_ms", "compiled_ms"), draw=draw, argv=argv)


def parts_of(row: dict[str, Any], result: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each of :data:`PARTS` in an edit; ``all else`` is what is left of its own time.

    The text encoder, and a decoder of whole pictures, were measured by themselves.
    """
    parts = {
        "text encoder": result["parts_ms"]["text"],
        "dense steps": row["dense_steps"] * (row["dense_step_ms"] or 0.0),
        "sparse steps": row["sparse_steps"] * (row["sparse_step_ms"] or 0.0),
        "decoder": result["parts_ms"]["vae"] if row["decode_ms"] is None else row["decode_ms"],
    }
    return parts | {"all else": max(0.0, row["edit_ms"] - sum(parts.values()))}


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Write the picture, in the format that the ending of the file's name says.

    Raises:
        ValueError: matplotlib cannot write this format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bars = max(len(result["rows"]) + len(result["compiled_ms"]) for result in results)
    size = 6.4 * len(results), 1.4 + 0.42 * bars
    figure, axes = plt.subplots(1, len(results), figsize=size, squeeze=False, layout="constrained")
    for axis, result in zip(axes[0], results, strict=True):
        draw_panel(axis, result)
    figure.savefig(out, dpi=DOTS_PER_INCH)
    plt.close(figure)


def draw_panel(axis: Any, result: dict[str, Any]) -> None:
    """Draw the bars of one file, the compiled pipeline's first."""
    slowest = max(result["compiled_ms"].values(), default=0.0)
    names = []
    for steps, ms in result["compiled_ms"].items():
        axis.barh(len(names), ms, color=_COMPILED)
        axis.annotate(f" {ms:.0f} ms", (ms, len(names)), va="center", fontsize=8)
        names.append(f"compiled, {steps} steps")
    for row in result["rows"]:
        start = 0.0
        for name, ms in parts_of(row, result).items():
            axis.barh(len(names), ms, left=start, color=PARTS[name], label=name if row is result["rows"][0] else None)
            start += ms
        ratio = f", {slowest / row['edit_ms']:.1f}x" if slowest else ""
        axis.annotate(f" {row['edit_ms']:.0f} ms{ratio}", (start, len(names)), va="center", fontsize=8)
        source = "" if row["source"] == "square" else f", {row['source']}"
        names.append(f"edit of {100 * row['active']:.0f} %{source}")
    axis.set_yticks(range(len(names)), names, fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.18 * max([slowest, *(row["edit_ms"] for row in result["rows"])]))
    axis.set_xlabel("from words to pixels (ms)")
    title = f"{MODELS.get(result['arch'], result['arch'])}, {result['size']}x{result['size']}, {result['steps']} steps"
    axis.set_title(f"{title}, {result['dtype']}\n{result['device_name']}", fontsize=10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower right")


if __name__ == "__main__":
    sys.exit(main())
