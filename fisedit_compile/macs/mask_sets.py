"""Counts the MACs of many masks, such as those of real edits: their mean, and how they spread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fisedit_compile.macs.counter import MacCounter
from fisedit_compile.macs.report import MacCount, MacReport


@dataclass(frozen=True)
class MaskCounts:
    """The counts of a set of masks.

    Attributes:
        reports: one report for each mask with an active pixel.
        empty: how many masks have no active pixel.
        of_empty: MACs of a sparse step with such a mask, which are those of the resolutions computed whole; 0 if there
            is no such mask.
    """

    reports: Sequence[MacReport]
    empty: int
    of_empty: int

    @property
    def mean(self) -> MacReport:
        """The mean over the masks that are not empty, in whole MACs; its ratio is dense MACs over mean sparse MACs."""
        total = reduce(add, (report.counted for report in self.reports))
        edit_size = sum(report.edit_size or 0.0 for report in self.reports) / len(self.reports)
        return replace(self.reports[0], sparse=_divided(total, len(self.reports)), edit_size=edit_size)

    @property
    def mean_with_empty(self) -> float:
        """The mean MACs of a sparse step over all masks, empty ones included."""
        total = sum(report.total for report in self.reports) + self.empty * self.of_empty
        return total / (len(self.reports) + self.empty)

    def percentile(self, q: float) -> float:
        """The ``q``-th percentile of the MACs of a sparse step over the masks that are not empty."""
        return float(np.percentile([report.total for report in self.reports], q))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON; ``each`` has the edit size, MACs and ratio of every mask that is not empty."""
        return {
            "used": len(self.reports),
            "empty": self.empty,
            "mean_with_empty": self.mean_with_empty,
            **{f"p{q}": self.percentile(q) for q in (5, 50, 95)},
            "each": [{"edit_size": r.edit_size, "macs_sparse": r.total, "ratio": r.ratio} for r in self.reports],
        }


def count_masks(counter: MacCounter, masks: Tensor) -> MaskCounts:
    """Count a sparse step for each mask by itself, with that mask for all samples of the batch.

    Args:
        counter: counts the model.
        masks: bool ``[n, h, w]`` with the proportions of the latents, to whose size they are any-pooled.

    Raises:
        ValueError: no mask has an active pixel.
        MaskError: the masks have other proportions than the latents.
    """
    filled = masks[masks.flatten(1).any(1)]
    if not len(filled):
        raise ValueError(f"none of the {len(masks)} masks has an active pixel")
    reports = [counter.report(mask=mask) for mask in tqdm(filled, desc="masks", leave=False)]
    empty = len(masks) - len(filled)
    nothing = torch.zeros(counter.latents, dtype=torch.bool)
    return MaskCounts(reports, empty, counter.report(mask=nothing).total if empty else 0)


def _divided(count: MacCount, n: int) -> MacCount:
    by = (count.by_op, count.by_resolution, count.by_module)
    return MacCount(*({key: round(macs / n) for key, macs in each.items()} for each in by))
