"""Padding: the few sizes that row counts are rounded up to, so that a step's shapes do not depend on the mask.

A CUDA graph is recorded for fixed shapes. A *bucket* fixes how many rows each resolution and how many halo rows each
convolution may have; a mask takes the smallest bucket that holds it. Kernels skip what is padding (``count``, see
``kernels/ops.py``), so that a bucket that is too large costs little, but tiles are chosen for its size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile.ir.layout import Size
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.taps import Taps
from fisedit_compile.planning.edit_plan import EditPlan

#: Shares of the latents that masks are rounded up to: steps of about a quarter.
SHARES = (0.03, 0.05, 0.07, 0.09, 0.12, 0.16, 0.2, 0.25, 0.31, 0.39, 0.5, 0.63, 0.8, 1.0)


@dataclass(frozen=True)
class Shape:
    """How ragged masks may be: what any-pooling adds to their share, and how many halo rows they have.

    Attributes:
        factor, summand: of the share, with each halving of the resolution.
        halo, halo_growth: halo rows as a share of a convolution's source, and more with each halving.
    """

    factor: float
    summand: float
    halo: float
    halo_growth: float


#: Of squares, of most masks that the paper's authors released (23 % become 29 % and 40 %), of the others, and of
#: isolated pixels: the largest of those holds any mask. Room for halo rows is memory alone, so that there is enough of
#: it: rows are what a mask's bucket should depend on.
SHAPES = {
    "compact": Shape(1.1, 0.01, 0.07, 0.08),
    "ragged": Shape(1.25, 0.02, 0.16, 0.12),
    "shreds": Shape(1.4, 0.08, 0.3, 0.15),
    "scattered": Shape(2.0, 0.15, 1.0, 0.0),
}

#: Rows are padded to a multiple.
MULTIPLE = 32


@dataclass(frozen=True)
class Bucket:
    """Room for rows at each resolution and for the halo rows of each convolution, all samples together."""

    name: str
    rows: Mapping[Size, int]
    halo: Mapping[Taps, int]

    def __hash__(self) -> int:
        return hash(self.name)

    def holds(self, other: Bucket) -> bool:
        """Whether everything of ``other`` has room here."""
        return all(count <= self.rows[size] for size, count in other.rows.items()) and all(
            count <= self.halo[taps] for taps, count in other.halo.items()
        )


class Buckets:
    """The buckets of one U-Net.

    Args:
        requests: what its sparse graph asks of a plan.
        batch: U-Net batch.
        latents: (height, width) of the latents.
        dense_below: see :class:`~fisedit_compile.SparsityConfig`.
    """

    def __init__(self, requests: Collection[PlanTensor], *, batch: int, latents: Size, dense_below: int) -> None:
        sizes: set[Size] = set()
        for where in (request.where for request in requests):
            if not isinstance(where, Taps):
                sizes.add(where)
            else:
                sizes.update([where.target] if where.dense else [where.source, where.target])
        self._taps: list[Taps] = [each.where for each in requests if each.kind == "halo"]  # type: ignore[misc]
        self._sizes = sorted(sizes, reverse=True)
        self._batch, self._latents, self._dense_below = batch, latents, dense_below
        self.ladder: list[Bucket] = list(self._made())

    def choose(self, plan: EditPlan) -> Bucket:
        """The smallest bucket that holds a plan."""
        needed = Bucket(
            "needed", plan.counts, {taps: len(plan.tensor(PlanTensor("halo", taps))) for taps in self._taps}
        )
        fitting = (bucket for bucket in self.ladder if bucket.holds(needed))
        return min(fitting, key=lambda bucket: sum(bucket.rows.values()))

    def _made(self) -> Iterator[Bucket]:
        for name, shape in SHAPES.items():
            for share in SHARES:
                rows, halo = {}, {}
                for size in self._sizes:
                    level = self._level(size)
                    grown = share * shape.factor**level + shape.summand * level
                    rows[size] = self._round(grown * self._pixels(size), size)
                for taps in self._taps:
                    room = shape.halo + shape.halo_growth * self._level(taps.source)
                    room = 1.0 if self._is_whole(taps.target) else min(room, 1.0)
                    halo[taps] = self._round(room * self._pixels(taps.source), taps.source)
                yield Bucket(f"{share:.0%} {name}", rows, halo)

    def _round(self, count: float, size: Size) -> int:
        pixels = self._pixels(size)
        return pixels if self._is_whole(size) else min(pixels, -(-math.ceil(count) // MULTIPLE) * MULTIPLE)

    def _pixels(self, size: Size) -> int:
        return self._batch * math.prod(size)

    def _is_whole(self, size: Size) -> bool:
        return min(size) < self._dense_below

    def _level(self, size: Size) -> int:
        """How often the latents' resolution is halved."""
        return max(0, round(math.log2(self._latents[0] / size[0])))


def pad_plan(plan: EditPlan, bucket: Bucket, requests: Collection[PlanTensor]) -> dict[PlanTensor, Tensor]:
    """The tensors of a plan with the sizes of a bucket.

    Padded rows are pixel 0 of sample 0, their taps lie outside the picture, and no entry of a table names one; halo
    rows of a table stand behind the padded rows.
    """
    padded = {}
    for request in requests:
        tensor, where = plan.tensor(request), request.where
        if request.kind in ("index", "sample"):
            assert not isinstance(where, Taps)
            tensor = F.pad(tensor, (0, bucket.rows[where] - len(tensor)))
        elif request.kind == "halo":
            assert isinstance(where, Taps)
            tensor = F.pad(tensor, (0, bucket.halo[where] - len(tensor)))
        elif request.kind == "table":
            assert isinstance(where, Taps)
            if not where.dense:
                rows = plan.counts[where.source]
                tensor = torch.where(tensor >= rows, tensor + (bucket.rows[where.source] - rows), tensor)
            tensor = F.pad(tensor, (0, 0, 0, bucket.rows[where.target] - len(tensor)), value=-1)
        padded[request] = tensor
    return padded
