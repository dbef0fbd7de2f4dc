"""The choices of rows compared on masks: predicted, and measured by running each resolution's layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from torch import Tensor

from fisedit_compile.compiler.lowered import Lowered
from fisedit_compile.cost_model.layer_timer import Timer
from fisedit_compile.cost_model.row_costs import RowCosts
from fisedit_compile.cost_model.row_layers import LayerShape
from fisedit_compile.ir.layout import Size
from fisedit_compile.planning.apsc import RowCandidate
from fisedit_compile.planning.edit_plan import EditPlan, plan_edit

#: In the order of the report: the mask itself, the paper's objective, all pixels, the least predicted time.
CHOICES = ("pixel", "paper", "whole", "measured")


@dataclass(frozen=True)
class Outcome:
    """One choice for one mask at one resolution; times in microseconds, of all its layers together."""

    name: str
    rows: int
    halo: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Of the prediction, relative to what was measured."""
        return self.predicted / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True)
class Comparison:
    """One choice at one resolution, over the masks of a set.

    Attributes:
        source: of the masks.
        size: the resolution.
        choice: one of ``CHOICES``.
        outcomes: one for each mask.
        layers: of each distinct layer, how many there are and the mean predicted and measured time of one.
    """

    source: str
    size: Size
    choice: str
    outcomes: tuple[Outcome, ...]
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def blocks(self) -> str:
        """What was chosen, and for how many masks where that differs."""
        names = Counter(outcome.name for outcome in self.outcomes)
        return ", ".join(name if len(names) == 1 else f"{name} ({count})" for name, count in names.most_common())

    def mean(self, attribute: str) -> float:
        """The mean of an attribute of the outcomes."""
        return fmean(getattr(outcome, attribute) for outcome in self.outcomes)

    @property
    def mean_error(self) -> float:
        """Mean of the predictions' relative errors without their sign."""
        return fmean(abs(outcome.error) for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        means = {name: self.mean(name) for name in ("rows", "predicted", "measured")}
        return {
            "masks": self.source,
            "size": list(self.size),
            "choice": self.choice,
            "blocks": self.blocks,
            **means,
            "error": self.mean_error,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "layers": self.layers,
        }


class BlockComparer:
    """Compares the choices for the masks of a U-Net.

    Args:
        lowered: whose layers they are; it may be of a U-Net on the meta device.
        costs: predictions.
        timer: measures; the same layer at the same rows is measured once.
    """

    def __init__(self, lowered: Lowered, costs: RowCosts, timer: Timer) -> None:
        self._lowered, self._costs, self._timer = lowered, costs, timer
        self._layers: dict[tuple[LayerShape, int], float] = {}
        self._fetches: dict[tuple[int, int], float] = {}

    def compare(self, source: str, masks: Sequence[Tensor]) -> Iterator[Comparison]:
        """Every choice at every sparse resolution.

        Args:
            source: a name for these masks.
            masks: each bool ``[n, h, w]`` at latent resolution.
        """
        batch = self._lowered.batch
        plans = [
            plan_edit(
                mask,
                self._lowered.plan_requests,
                batch=batch,
                blocks="measured",
                dense_below=self._lowered.config.dense_below,
                costs=self._costs,
            )
            for mask in masks
        ]
        for size in self._costs.sizes:
            for choice in CHOICES:
                candidates = [_candidate(plan, size, choice) for plan in plans]
                outcomes = tuple(self._outcome(size, candidate) for candidate in candidates)
                yield Comparison(source, size, choice, outcomes, self._detail(size, [each.rows for each in candidates]))

    def _outcome(self, size: Size, candidate: RowCandidate) -> Outcome:
        shapes, channels = self._costs.work(size)
        measured = sum(n * self._layer(shape, candidate.rows) for shape, n in shapes.items())
        measured += self._fetch(channels, candidate.halo)
        return Outcome(candidate.name, candidate.rows, candidate.halo, candidate.microseconds, measured)

    def _detail(self, size: Size, rows: Sequence[int]) -> list[dict[str, Any]]:
        shapes, _ = self._costs.work(size)
        return [
            {
                "layer": str(shape),
                "count": n,
                "predicted": fmean(self._costs.calibration.microseconds(shape, each) for each in rows),
                "measured": fmean(self._layer(shape, each) for each in rows),
            }
            for shape, n in shapes.items()
        ]

    def _layer(self, shape: LayerShape, rows: int) -> float:
        key = (shape, rows)
        if key not in self._layers:
            self._layers[key] = self._timer.layer(shape, rows)
        return self._layers[key]

    def _fetch(self, channels: int, rows: int) -> float:
        key = (channels, rows)
        if key not in self._fetches:
            self._fetches[key] = self._timer.fetch(channels, rows) if channels else 0.0
        return self._fetches[key]


def _candidate(plan: EditPlan, size: Size, choice: str) -> RowCandidate:
    measured = plan.measured[size]
    if choice == "measured":
        return measured.chosen
    if choice == "whole":
        return measured.candidates[-1]
    return measured.of_tile((1, 1) if choice == "pixel" else plan.choices[size].chosen.tile)
