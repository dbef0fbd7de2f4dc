"""The few sizes that row counts are padded to, so that the shapes of a step do not change with every mask.

A CUDA graph is captured for fixed shapes. A *bucket* fixes how many rows each resolution and how many halo rows each
convolution may have; an edit takes the smallest bucket that holds its plan. Kernels skip the padding (``count``, see
``kernels/ops.py``), so that a bucket that is too large costs little; but they choose their tiles for its size.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile.config import is_whole
from fisedit_compile.ir.layout import Size
from fisedit_compile.ir.plan_tensor import PlanTensor
from fisedit_compile.ir.taps import Taps
from fisedit_compile.ir.tile_grid import TILES, fewest_pixels
from fisedit_compile.planning.edit_plan import EditPlan, row_resolutions

#: Shares of the latents that masks are rounded up to, each about a quarter larger than the one before.
MASK_SHARES = (0.03, 0.05, 0.07, 0.09, 0.12, 0.16, 0.2, 0.25, 0.31, 0.39, 0.5, 0.63, 0.8, 1.0)


@dataclass(frozen=True)
class Raggedness:
    """How ragged the masks of a class may be: how any-pooling enlarges them, and how many halo rows they have.

    At a resolution that is the latents' halved ``n`` times, such a mask of ``share`` of the latents is given room for
    rows of ``share * factor**n + summand * n``, and for halo rows of ``halo + halo_growth * n``, as shares of all
    pixels there.
    """

    factor: float
    summand: float
    halo: float
    halo_growth: float


#: Four classes of raggedness: ``compact`` holds squares, ``ragged`` most of the masks that the paper's authors released
#: (23 % of the latents become 29 % and 40 % at the next two resolutions), ``shreds`` the rest of those, and
#: ``scattered`` isolated pixels; its largest bucket holds any mask. Room for halo rows costs memory alone, so it is
#: ample: the number of rows should decide which bucket a mask takes.
RAGGEDNESS = {
    "compact": Raggedness(1.1, 0.01, 0.07, 0.08),
    "ragged": Raggedness(1.25, 0.02, 0.16, 0.12),
    "shreds": Raggedness(1.4, 0.08, 0.3, 0.15),
    "scattered": Raggedness(2.0, 0.15, 1.0, 0.0),
}

#: Row counts are rounded up to multiples of this.
MULTIPLE = 32


@dataclass(frozen=True)
class Bucket:
    """How many rows each resolution and how many halo rows each convolution may have, all samples together."""

    name: str
    rows: Mapping[Size, int]
    halo: Mapping[Taps, int]

    def __hash__(self) -> int:
        return hash(self.name)

    def holds(self, other: Bucket) -> bool:
        """Whether ``other`` has nowhere more rows or halo rows than this bucket."""
        return all(count <= self.rows[size] for size, count in other.rows.items()) and all(
            count <= self.halo[taps] for taps, count in other.halo.items()
        )


class Buckets:
    """The buckets of one U-Net, in ``ladder``: for each class of raggedness one for each of :data:`MASK_SHARES`.

    Args:
        requests: the tensors of a plan that its sparse graph takes.
        batch: samples of the U-Net's batch.
        latents: (height, width) of the latents.
        dense_below: see :class:`~fisedit_compile.SparsityConfig`.
    """

    def __init__(self, requests: Collection[PlanTensor], *, batch: int, latents: Size, dense_below: int) -> None:
        self._taps: list[Taps] = [each.where for each in requests if each.kind == "halo"]  # type: ignore[misc]
        self._sizes = sorted(row_resolutions(requests), reverse=True)
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
        for name, raggedness in RAGGEDNESS.items():
            for share in MASK_SHARES:
                rows, halo = {}, {}
                for size in self._sizes:
                    level = self._level(size)
                    grown = share * raggedness.factor**level + raggedness.summand * level
                    rows[size] = self._round(grown * self._pixels(size), size)
                for taps in self._taps:
                    room = raggedness.halo + raggedness.halo_growth * self._level(taps.source)
                    room = 1.0 if is_whole(taps.target, self._dense_below) else min(room, 1.0)
                    halo[taps] = self._round(room * self._pixels(taps.source), taps.source)
                yield Bucket(f"{share:.0%} {name}", rows, halo)

    def _round(self, count: float, size: Size) -> int:
        pixels = self._pixels(size)
        if is_whole(size, self._dense_below):
            return pixels
        return min(pixels, -(-math.ceil(count) // MULTIPLE) * MULTIPLE)

    def _pixels(self, size: Size) -> int:
        return self._batch * math.prod(size)

    def _level(self, size: Size) -> int:
        """How often the latents' resolution is halved to get this one."""
        return max(0, round(math.log2(self._latents[0] / size[0])))


def pad_plan(plan: EditPlan, bucket: Bucket, requests: Collection[PlanTensor]) -> dict[PlanTensor, Tensor]:
    """The tensors of a plan, padded to the sizes of a bucket.

    A padded row stands for pixel 0 of sample 0; all its taps lie outside the picture, and no entry of a table refers to
    it. In tables halo rows are numbered from the end of the padded rows.
    """
    padded = {}
    for request in requests:
        tensor, where = plan.tensor(request), request.where
        if request.kind in ("index", "sample"):
            assert not isinstance(where, Taps)
            tensor = F.pad(tensor, (0, bucket.rows[where] - len(tensor)))
        elif request.kind in ("tiles", "tile_ids"):
            assert not isinstance(where, Taps)
            fewest = fewest_pixels(where)  # none, where there are fewer pixels than tiles
            most = min(plan.batch * TILES, bucket.rows[where] // fewest) if fewest else plan.batch * TILES
            room = (0, most - len(tensor)) if tensor.ndim == 1 else (0, 0, 0, most - len(tensor))
            tensor = F.pad(tensor, room, value=-1)
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
