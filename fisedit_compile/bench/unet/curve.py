"""Says how the time of a sparse step grows with the active area, and where the dense U-Net becomes faster."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np


def points(rows: Sequence[dict[str, Any]], attention: str) -> list[tuple[float, float]]:
    """The pairs (active share, ms of a sparse step) of the square masks of one attention mode, sorted by share."""
    chosen = [row for row in rows if row["attention"] == attention and row["masks"]["source"] == "square"]
    return sorted({row["active"]: row["sparse_ms"] for row in chosen}.items())


def crossover(curve: Sequence[tuple[float, float]], dense_ms: float) -> float | None:
    """The least active share at which a sparse step takes as long as the dense U-Net, interpolated linearly.

    None if no two neighbouring points lie on both sides of it: sparse steps were faster at every share measured, or at
    none.
    """
    for (share, ms), (next_share, next_ms) in pairwise(curve):
        if ms < dense_ms <= next_ms:
            return share + (next_share - share) * (dense_ms - ms) / (next_ms - ms)
    return None


def line(curve: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    """The straight line through the points by least squares; None for fewer than three, which say nothing of the fit.

    Returns:
        ``ms_of_nothing`` and ``ms_of_everything``, the line's times at an active share of 0 and 1, and ``r2``, the
        share of the times' variance that it explains.
    """
    if len(curve) < 3:
        return None
    shares, ms = np.array(curve).T
    slope, start = np.polyfit(shares, ms, 1)
    rest, total = ((ms - start - slope * shares) ** 2).sum(), ((ms - ms.mean()) ** 2).sum()
    return {
        "ms_of_nothing": float(start),
        "ms_of_everything": float(start + slope),
        "r2": float(1 - rest / total) if total else 1.0,
    }


def curves(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each attention mode the ``crossover`` with the fastest dense call, and the straight ``line``."""
    found: dict[str, Any] = {"crossover": {}, "line": {}}
    for attention in dict.fromkeys(row["attention"] for row in rows):
        curve = points(rows, attention)
        dense = min(min(row["dense_ms"].values()) for row in rows if row["attention"] == attention)
        found["crossover"][attention] = crossover(curve, dense)
        found["line"][attention] = line(curve)
    return found
