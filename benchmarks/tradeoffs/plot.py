"""Figure A2: what stays of the picture against what follows the words, one curve a method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Heads and names of the figures on both axes of each panel; further right and further up is better.
_PANELS = (
    (("CLIP image-image similarity", "image_similarity"), ("CLIP directional similarity", "directional_similarity")),
    (("PSNR outside what the dense edit changes (dB)", "psnr"), ("success by the judge", "success")),
)
_OWN = "#d1495b"
_OTHERS = ("#0b5fa5", "#2a9d8f", "#e9a03b", "#6a4c93", "#777777", "#7fb069", "#a0522d", "#3d5a80")
_DOTS_PER_INCH = 160


def draw(rows: Sequence[Mapping[str, Any]], out: Path, *, title: str) -> None:
    """Write the plot, in the format that the ending of the file's name says."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(_PANELS), figsize=(13, 5.2), layout="constrained")
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    others = iter(_OTHERS)
    for method, points in by_method.items():
        own = method.startswith("fisedit")
        colour = _OWN if own else next(others)
        for axis, ((_, x), (_, y)) in zip(axes, _PANELS, strict=True):
            _curve(axis, [row for row in points if row[x] is not None and row[y] is not None], x, y, colour, own)
    for axis, ((across, _), (up, _)) in zip(axes, _PANELS, strict=True):
        axis.set(xlabel=across, ylabel=up)
        axis.grid(color="#e5e5e5", linewidth=0.6)
        axis.set_axisbelow(True)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle(title, fontsize=10)
    figure.savefig(out, dpi=_DOTS_PER_INCH)
    plt.close(figure)


def _curve(axis: Any, points: Sequence[Mapping[str, Any]], x: str, y: str, colour: str, own: bool) -> None:
    if not points:
        return
    single = points[0]["value"] is None
    parameter = points[0]["parameter"]
    axis.plot(
        [row[x] for row in points],
        [row[y] for row in points],
        color=colour,
        marker="*" if single and own else "o",
        markersize=11 if single and own else 4.5,
        linewidth=2 if own else 1.3,
        label=points[0]["title"]
        + (f" ({parameter} {points[0]['value']:g}-{points[-1]['value']:g})" if parameter else ""),
    )
    for row in {id(row): row for row in (points[0], points[-1])}.values():  # both ends say which way the curve runs
        if not single:
            axis.annotate(
                f"{row['value']:g}",
                (row[x], row[y]),
                xytext=(4, 3),
                textcoords="offset points",
                fontsize=7,
                color=colour,
            )
