"""Plots the time of a sparse step over the active area, from files of ``fisedit-compile bench unet --json``.

    fisedit-compile bench unet --arch sd2 --size 768 --curve --masks MASKS.npz --device cuda --json out/sd2.json
    python benchmarks/plot_unet.py out/sd2.json --out out/sd2.svg        # needs matplotlib: pip install '.[plot]'

Each file gets a panel. It has a curve for each attention mode; horizontal lines for the dense U-Net, eager and compiled
(the fastest mode that was measured); a ring where the dense U-Net becomes faster; and a star for the mean of real
masks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from plot_files import DOTS_PER_INCH, MODELS, run

from fisedit_compile.bench.unet.curve import points

_MODES = {"full": "#0b5fa5", "masked": "#d1495b"}
_MOST_HEADROOM = 2.5  # an eager call slower than all else by more than this factor is named instead of drawn


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns 0, or 2 for a file that cannot be used."""
    description = "Plot the time of a sparse step over the active area."
    return run("plot_unet", description, bench="bench unet", keys=("arch", "size"), draw=draw, argv=argv)


def title(result: dict[str, Any]) -> str:
    """Two lines with the conditions of a result."""
    return (
        f"{MODELS.get(result['arch'], result['arch'])}, {result['size']}x{result['size']}, batch {result['batch']}, "
        f"{result['dtype']}\n{result['device_name']}, torch {result['versions']['torch']}"
    )


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Write the picture, in the format that the ending of the file's name says.

    Raises:
        ValueError: matplotlib cannot write this format.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(results), figsize=(5.6 * len(results), 4.4), squeeze=False, layout="constrained")
    for axis, result in zip(axes[0], results, strict=True):
        draw_panel(axis, result)
    figure.savefig(out, dpi=DOTS_PER_INCH)
    plt.close(figure)


def draw_panel(axis: Any, result: dict[str, Any]) -> None:
    """Draw the panel of one file."""
    rows = result["rows"]
    top = max(
        ms for row in rows for name, ms in {**row["dense_ms"], "sparse": row["sparse_ms"]}.items() if name != "eager"
    )
    for name, colour, style in dense_lines(rows):
        ms = fmean(row["dense_ms"][name] for row in rows)
        label = {"eager": "eager", "compile": "compiled"}.get(name, f"compiled ({name.removesuffix('-no-cudagraphs')})")
        text = f"dense, {label}: {ms:.1f} ms"
        if ms > _MOST_HEADROOM * top:  # drawing it would press all other lines against the bottom
            axis.annotate(f"{text}, above", (0.01, 0.96), xycoords="axes fraction", fontsize=8, color=colour)
            continue
        axis.axhline(ms, color=colour, linestyle=style, linewidth=1.2)
        axis.annotate(text, (1, ms), xytext=(0, 3), textcoords="offset points", fontsize=8, color=colour)
    for attention in dict.fromkeys(row["attention"] for row in rows):
        draw_mode(axis, result, attention)
    axis.set(xlabel="active share of the latents (%)", ylabel="time of one U-Net call (ms)", xlim=(0, 101))
    axis.set_ylim(0, 1.12 * axis.get_ylim()[1])
    axis.set_title(title(result), fontsize=10)
    axis.grid(color="#e5e5e5", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower right")


def dense_lines(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """The dense calls to draw, each with colour and line style: the eager one and the fastest compiled one."""
    compiled = [name for name in rows[0]["dense_ms"] if name != "eager"]
    lines = [("eager", "#777777", ":")] if "eager" in rows[0]["dense_ms"] else []
    if compiled:
        fastest = min(compiled, key=lambda name: fmean(row["dense_ms"][name] for row in rows))
        lines.append((fastest, "#222222", "--"))
    return lines


def draw_mode(axis: Any, result: dict[str, Any], attention: str) -> None:
    """Draw the curve, the crossover and the real masks of one attention mode."""
    colour = _MODES.get(attention, "#2a9d8f")
    rows = [row for row in result["rows"] if row["attention"] == attention]
    curve = points(rows, attention)
    if curve:
        shares, ms = zip(*((100 * share, ms) for share, ms in curve), strict=True)
        label = f"sparse step, {attention} attention"
        axis.plot(shares, ms, color=colour, marker="o", markersize=3.5, linewidth=1.6, label=label)
    share = result.get("crossover", {}).get(attention)
    if share is not None:
        at = (100 * share, min(min(row["dense_ms"].values()) for row in rows))
        axis.plot(*at, marker="o", markersize=10, markerfacecolor="none", markeredgecolor=colour, linestyle="none")
        white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
        axis.annotate(
            f"{share:.0%}", at, xytext=(6, -15), textcoords="offset points", color=colour, fontsize=9, bbox=white
        )
    for row in rows:
        if row["masks"]["source"] != "square":
            label = f"mean of {row['masks']['used']} real masks, {attention}"
            place = (100 * row["active"], row["sparse_ms"])
            style = {"marker": "*", "markersize": 12, "markeredgecolor": "white", "linestyle": "none"}
            axis.plot(*place, color=colour, label=label, **style)


if __name__ == "__main__":
    sys.exit(main())
