"""``bench kernels --sweep``: the best tile of the product of rows at many sizes, for ``row_product_tiles.json``."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile.cli.kernel_cases import normal
from fisedit_compile.cli.kernel_timing import replay_microseconds
from fisedit_compile.kernels.row_product_launch import launch_row_product
from fisedit_compile.kernels.row_product_tiles import Tile

#: (taps, input channels, output channels, geglu) of the products of Stable Diffusion's three widths, and rows of each.
_PRODUCTS: tuple[tuple[tuple[tuple[int, int, int, bool], ...], tuple[int, ...]], ...] = (
    (
        ((9, 320, 320, False), (9, 640, 320, False), (9, 960, 320, False), (1, 320, 960, False), (1, 320, 320, False),
         (1, 320, 1280, True), (1, 1280, 320, False)),
        (260, 400, 600, 880, 1250, 1800, 2740, 4000, 5600, 9000, 18432),
    ),
    (
        ((9, 640, 640, False), (9, 1280, 640, False), (9, 1920, 640, False), (1, 640, 1920, False),
         (1, 640, 640, False), (1, 640, 2560, True), (1, 2560, 640, False)),
        (64, 110, 170, 250, 400, 600, 880, 1350, 2000, 3000, 4608),
    ),
    (
        ((9, 1280, 1280, False), (9, 2560, 1280, False), (1, 1280, 3840, False), (1, 1280, 1280, False),
         (1, 1280, 5120, True), (1, 5120, 1280, False)),
        (36, 72, 110, 160, 200, 290, 420, 600, 850, 1200, 2048),
    ),
)  # fmt: skip

#: Tiles worth a try on Hopper, with the stages of the software pipeline, and those for geglu, which loads two weights.
_TILES = (
    (Tile(128, 256, 64, 8, 3), 0), (Tile(128, 128, 64, 8, 3), 3), (Tile(128, 128, 64, 4, 3), 0),
    (Tile(128, 64, 64, 4, 4), 3), (Tile(128, 64, 128, 4, 3), 0), (Tile(64, 256, 64, 8, 4), 3),
    (Tile(64, 128, 64, 4, 4), 4), (Tile(64, 128, 128, 4, 3), 0), (Tile(64, 64, 64, 4, 4), 3),
    (Tile(64, 64, 128, 4, 3), 4), (Tile(32, 128, 64, 4, 4), 4), (Tile(16, 64, 64, 4, 5), 3),
    (Tile(16, 128, 128, 4, 5), 0),
)  # fmt: skip
_SPLITS = ((1, False), (2, False), (4, False), (2, True), (3, True), (4, True), (6, True), (8, True), (12, True))
_MULTIPROCESSORS = 132

#: Bytes of weights that the launches of a graph go through: a step of a U-Net never finds its weights in a cache.
_WEIGHT_BYTES = 150e6
_LAUNCHES = 8


@dataclass(frozen=True)
class Product:
    """The size of one product."""

    rows: int
    taps: int
    channels: int
    filters: int
    geglu: bool

    @property
    def depth(self) -> int:
        return self.taps * self.channels

    def tiles(self) -> Iterator[Tile]:
        """The tiles and splits that may be the best: none that leave most of the GPU, or of themselves, idle."""
        for tile, geglu_stages in _TILES:
            stages = geglu_stages if self.geglu else tile.stages
            narrow = (tile.rows <= 16 and self.rows > 250) or (tile.rows <= 32 and self.rows > 600)
            if not stages or narrow or tile.rows > 2 * self.rows:
                continue
            programs = math.ceil(self.rows / tile.rows) * math.ceil(self.filters / tile.filters)
            steps = self.depth // tile.channels
            for splits, second_kernel in _SPLITS:
                if splits == 1 and programs < 20:
                    continue
                if splits > 1 and (steps < 3 * splits or programs * splits > 3 * _MULTIPROCESSORS):
                    continue
                if splits > 1 and not second_kernel and tile.rows * tile.filters > 128 * 64:
                    continue  # one program would add too much
                if splits >= 6 and 2 * programs * splits < _MULTIPROCESSORS:
                    continue
                yield replace(tile, stages=stages, splits=splits, second_kernel=second_kernel)


@dataclass
class _Inputs:
    rows: Tensor
    halo: Tensor | None
    weights: list[Tensor]
    bias: Tensor
    table: Tensor | None
    residual: Tensor | None

    @classmethod
    def of(cls, product: Product, device: torch.device, dtype: torch.dtype) -> _Inputs:
        def fresh(*shape: int) -> Tensor:
            return normal(*shape, device=device, dtype=dtype)

        filters = product.filters * (2 if product.geglu else 1)
        copies = max(3, min(_LAUNCHES, int(_WEIGHT_BYTES // (filters * product.depth * dtype.itemsize))))
        halo = fresh(max(16, product.rows // 4), product.channels) if product.taps > 1 else None
        table = None
        if halo is not None:  # rows as a square has them: neighbours lie a side apart
            side = math.isqrt(max(product.rows // 2, 1))
            taps = torch.tensor([y * side + x for y in (-1, 0, 1) for x in (-1, 0, 1)], device=device)
            table = torch.arange(product.rows, device=device)[:, None] + taps
            table = table.clamp_(0, product.rows + len(halo) - 1).int()
        return cls(
            rows=fresh(product.rows, product.channels),
            halo=halo,
            weights=[fresh(filters, product.depth) / product.depth**0.5 for _ in range(copies)],
            bias=fresh(filters),
            table=table,
            residual=None if product.geglu else fresh(product.rows, product.filters),
        )


def sweep(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[list[dict[str, Any]], int]:
    """Time every tile at every size, for at most ``seconds``.

    Returns:
        What ``row_product_tiles.json`` holds for each size, the best tile and its microseconds beside those of cuBLAS,
        and the number of sizes that were left out for want of time.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    found, skipped = [], 0
    for product in (Product(m, *each) for products, rows in _PRODUCTS for each in products for m in rows):
        if time.perf_counter() - start > seconds:
            skipped += 1
            continue
        inputs = _Inputs.of(product, device, dtype)
        times = {tile: _time(product, inputs, tile) for tile in product.tiles()}
        best = min(times, key=lambda tile: times[tile])
        columns = normal(product.rows, product.depth, device=device, dtype=dtype)

        def library(i: int, columns: Tensor = columns, inputs: _Inputs = inputs) -> None:
            F.linear(columns, inputs.weights[i % len(inputs.weights)], inputs.bias)

        size = {
            "depth": product.depth,
            "filters_out": product.filters,
            "geglu": product.geglu,
            "rows_out": product.rows,
        }
        measured = {"us": times[best], "library_us": replay_microseconds(library, _LAUNCHES)}
        found.append({**size, **asdict(best), **{name: round(us, 2) for name, us in measured.items()}})
    return found, skipped


def _time(product: Product, inputs: _Inputs, tile: Tile) -> float:
    """Microseconds with a bias and a residual; with cold weights, as in a step."""

    def launch(i: int) -> None:
        weight = inputs.weights[i % len(inputs.weights)]
        launch_row_product(
            "sweep", inputs.rows, inputs.halo, weight, inputs.bias, inputs.table, None, None, None, inputs.residual,
            None, None, "geglu" if product.geglu else "none", keep_raw=False, tile=tile,
        )  # fmt: skip

    return replay_microseconds(launch, _LAUNCHES)
