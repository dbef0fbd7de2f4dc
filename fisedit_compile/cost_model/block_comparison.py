"""The ways to cover a mask with rows, compared by their predicted time and by that of running the layers."""

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

#: What may choose the rows, in the order of the report: ``pixel`` takes the mask itself, ``paper`` what the paper's
#: objective chooses, ``whole`` every pixel, and ``measured`` the candidate with the least predicted time.
CHOICES = ("pixel", "paper", "whole", "measured")


@dataclass(frozen=True)
class Outcome:
    """One choice for one mask at one resolution.

    Attributes:
        name: the rows chosen, as :attr:`RowCandidate.name` has them.
        rows, halo: how many rows are computed, and how many halo rows are fetched, all samples together.
        predicted, measured: microseconds that all layers of the resolution take together.
    """

    name: str
    rows: int
    halo: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """How far the prediction is off, relative to the measured time; negative if it is too short."""
        return self.predicted / self.measured - 1 if self.measured else 0.0


@dataclass(frozen=True)
class Comparison:
    """One choice at one resolution, over the masks of a set.

    Attributes:
        source: a name for the set of masks.
        size: the resolution (height, width).
        choice: one of ``CHOICES``.
        outcomes: one for each mask.
        layers: a dict for each distinct layer: its description, how many of it there are, and the mean predicted and
            measured microseconds of one, over the masks.
    """

    source: str
    size: Size
    choice: str
    outcomes: tuple[Outcome, ...]
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def blocks(self) -> str:
        """The names of the rows chosen; if they differ from mask to mask, with the number of masks for each."""
        names = Counter(outcome.name for outcome in self.outcomes)
        return ", ".join(name if len(names) == 1 else f"{name} ({count})" for name, count in names.most_common())

    def mean(self, attribute: str) -> float:
        """The mean of an attribute of the outcomes."""
        return fmean(getattr(outcome, attribute) for outcome in self.outcomes)

    @property
    def mean_error(self) -> float:
        """The mean over the masks of the prediction's relative error, without its sign."""
        return fmean(abs(outcome.error) for outcome in self.outcomes)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as plain values for JSON; times in microseconds."""
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
    """Compares the choices of rows for one U-Net on any masks.

    Args:
        lowered: the U-Net whose layers are compared; it may be on the meta device.
        costs: predicts the times.
        timer: measures the times; each layer is measured once at each number of rows.
    """

    def __init__(self, lowered: Lowered, costs: RowCosts, timer: Timer) -> None:
        self._lowered, self._costs, self._timer = lowered, costs, timer
        self._layers: dict[tuple[LayerShape, int], float] = {}
        self._fetches: dict[tuple[int, int], float] = {}

    def compare(self, source: str, masks: Sequence[Tensor]) -> Iterator[Comparison]:
        """Compare every choice at every sparse resolution.

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
    by_cost = plan.cost_choices[size]
    if choice == "measured":
        return by_cost.chosen
    if choice == "whole":
        return by_cost.candidates[-1]
    return by_cost.of_tile((1, 1) if choice == "pixel" else plan.paper_choices[size].chosen.tile)
