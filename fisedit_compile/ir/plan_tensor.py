"""The index tensors that a sparse graph takes from the plan of an edit, each named by a request."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from fisedit_compile.ir.layout import Size
from fisedit_compile.ir.taps import Taps
from fisedit_compile.ir.tile_grid import TILES, most_pixels

_OF_SIZE = ("index", "sample", "offsets", "count", "row_of", "tiles", "tile_ids", "tile_sizes")
_OF_TAPS = ("table", "halo")


@dataclass(frozen=True)
class PlanTensor:
    """A request for one tensor of a plan; M is the number of rows, B that of the batch's samples.

    Attributes:
        kind: which tensor. Those of a resolution: ``index`` int64 ``[M]`` has the pixel id of each row; ``sample``
            int64 ``[M]`` the sample that each row belongs to; ``offsets`` int32 ``[B + 1]`` the cumulative row counts
            of the samples; ``count`` int32 ``[1]`` the number of rows; ``row_of`` int32 ``[B * height * width]`` the
            row of each pixel, -1 where a pixel is no row; ``tiles`` int32 ``[F, P]`` the rows of each tile all of
            whose pixels are rows, padded with -1, ``tile_ids`` int32 ``[F]`` which it is, ``sample * TILES + tile``,
            and ``tile_sizes`` int32 ``[TILES]`` the pixels of each tile, see ``tile_grid``. Those of a convolution:
            ``table`` int32 ``[M, taps]`` with a row for each row of the output, and ``halo`` int64 ``[halo rows]``,
            see :func:`~fisedit_compile.planning.neighbour_table.neighbour_table`.
        where: the resolution (height, width), or the convolution's :class:`Taps`.

    Raises:
        ValueError: an unknown ``kind``, a ``where`` that does not fit it, or a halo of a source that has none.
    """

    kind: Literal["index", "sample", "offsets", "count", "row_of", "tiles", "tile_ids", "tile_sizes", "table", "halo"]
    where: Size | Taps

    def __post_init__(self) -> None:
        if self.kind not in (*_OF_SIZE, *_OF_TAPS):
            raise ValueError(f"PlanTensor.kind is {self.kind!r}; give one of {(*_OF_SIZE, *_OF_TAPS)}")
        if isinstance(self.where, Taps) != (self.kind in _OF_TAPS):
            wanted = "Taps" if self.kind in _OF_TAPS else "a resolution (height, width)"
            raise ValueError(f"PlanTensor({self.kind!r}) needs {wanted} as where; {self.where!r} was given")
        if self.kind == "halo" and isinstance(self.where, Taps):
            if self.where.dense:
                raise ValueError("a dense source has no halo, its table holds pixel ids; ask for the table alone")
            if self.where.inside:
                raise ValueError("a source of rows alone has no halo; ask for the table alone")

    def of_full_mask(self, batch: int) -> Tensor:
        """A tensor on the meta device, of the shape and dtype that the plan gives where every pixel is a row.

        A halo has no rows then: no pixel is left that the base would have to give.

        Args:
            batch: samples of the U-Net's batch, B.
        """
        taps = self.where if isinstance(self.where, Taps) else None
        size = taps.target if taps is not None else self.where
        pixels = batch * prod(size)  # type: ignore[arg-type]
        tiles = batch * TILES
        shape: dict[str, tuple[int, ...]] = {
            "tiles": (tiles, most_pixels(size)), "tile_ids": (tiles,), "tile_sizes": (TILES,),  # type: ignore[arg-type]
            "offsets": (batch + 1,), "count": (1,), "table": (pixels, prod(taps.kernel) if taps else 0), "halo": (0,),
        }  # fmt: skip
        dtype = torch.int64 if self.kind in ("index", "sample", "halo") else torch.int32
        return torch.empty(shape.get(self.kind, (pixels,)), dtype=dtype, device="meta")
