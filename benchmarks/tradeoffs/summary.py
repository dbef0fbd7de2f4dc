"""Means over the cases, a row a setting, and FID of each setting's pictures; as numbers and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

import numpy as np
import torch
from tabulate import tabulate

from fisedit_compile.quality.frechet import frechet_distance
from tradeoffs.curves import CURVES, Setting
from tradeoffs.workers import DENSE, RENDERED, CaseResult

#: Heads of the table, and the names of the figures in them.
_HEADS = {
    "image-image": "image_similarity",
    "directional": "directional_similarity",
    "CLIP accuracy": "follows",
    "success": "success",
    "wrong object": "wrong",
    "equal outside": "equal",
    "PSNR outside, dB": "psnr",
    "FID to dense": "fid_dense",
    "FID to rendered": "fid_rendered",
    "seconds": "seconds",
    "U-Net calls": "calls",
    "cases": "cases",
}
_MEANS = ("image_similarity", "directional_similarity", "follows", "equal", "psnr", "calls")
_VERDICTS = ("success", "wrong")


def summarise(
    settings: Sequence[Setting], results: Sequence[CaseResult], timed: Mapping[str, Sequence[float]]
) -> list[dict[str, Any]]:
    """A row for each setting, in their order, as ``json.dump`` takes it; a figure that no case has is None.

    Args:
        settings: all that were asked for.
        results: of the cases.
        timed: name of a setting -> seconds of its edits that count.
    """
    return [_row(setting, results, timed.get(setting.name, ())) for setting in settings]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table in markdown."""
    lines = [
        [row["title"], _shown(row["value"]), *(_shown(row[name]) for name in _HEADS.values())]
        for row in rows
        if row["cases"]
    ]
    text = tabulate(lines, ["method", "parameter", *_HEADS], tablefmt="github", disable_numparse=True)
    missing = [
        f"{row['title']} {_shown(row['value'])}: failed in {row['failed']} cases" for row in rows if row["failed"]
    ]
    return "\n".join([text, *([""] if missing else []), *missing])


def _row(setting: Setting, results: Sequence[CaseResult], seconds: Sequence[float]) -> dict[str, Any]:
    of = [(result, each) for result in results for each in result.figures if each.setting == setting.name]
    figures = [each for _, each in of]
    row: dict[str, Any] = {
        "method": setting.method,
        "title": CURVES[setting.method].title,
        "parameter": CURVES[setting.method].parameter,
        "value": setting.value,
        "cases": len(figures),
        "judged": sum(each.judged for each in figures),
        "failed": sum(setting.name in result.failed for result in results),
        **{name: _mean([getattr(each, name) for each in figures]) for name in _MEANS},
        **{name: _mean([getattr(each, name) for each in figures if each.judged]) for name in _VERDICTS},
        "seconds": median(seconds) if seconds else None,
    }
    for key, of_what in (("fid_dense", DENSE), ("fid_rendered", RENDERED)):
        sets = [[result.features[name] for result, _ in of] for name in (setting.name, of_what)]
        row[key] = frechet_distance(*(torch.from_numpy(np.stack(each)) for each in sets)) if of else None
    return row


def _mean(values: Sequence[float | None]) -> float | None:
    known = [float(value) for value in values if value is not None]
    return mean(known) if known else None


def _shown(figure: float | int | None) -> str:
    if figure is None:
        return "-"
    if isinstance(figure, int) or figure == round(figure, 2):
        return f"{figure:g}"
    return f"{figure:.1f}" if abs(figure) >= 10 else f"{figure:.3f}"
