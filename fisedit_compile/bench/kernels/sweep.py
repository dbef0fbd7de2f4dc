"""``bench kernels --sweep``: the fastest tile of the product of rows at many sizes, for ``row_product_tiles.json``.

A product of rows is a convolution or linear layer on rows; with ``geglu`` the second half of its filters gates the
first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile.bench.kernels.cases import BATCH, convolution_inputs, normal, square
from fisedit_compile.bench.kernels.timing import replay_microseconds
from fisedit_compile.kernels.implicit_gemm.row_product_launch import launch_row_product
from fisedit_compile.kernels.implicit_gemm.row_product_tiles import Tile
from fisedit_compile.kernels.launch.triton_launch import compiling_alone

#: For each of Stable Diffusion's three widths: its products as (taps, input channels, output channels, geglu), the side
#: of its maps at 768x768, and the sides of the square masks that they are timed with.
_PRODUCTS: tuple[tuple[tuple[tuple[int, int, int, bool], ...], int, tuple[int, ...]], ...] = (
    (
        ((9, 320, 320, False), (9, 640, 320, False), (9, 960, 320, False), (1, 320, 960, False), (1, 320, 320, False),
         (1, 320, 1280, True), (1, 1280, 320, False)),
        96, (11, 16, 21, 26, 30, 37, 43, 48, 53, 60, 75, 96),
    ),
    (
        ((9, 640, 640, False), (9, 1280, 640, False), (9, 1920, 640, False), (1, 640, 1920, False),
         (1, 640, 640, False), (1, 640, 2560, True), (1, 2560, 640, False)),
        48, (6, 8, 11, 13, 15, 17, 19, 22, 25, 27, 34, 48),
    ),
    (
        ((9, 1280, 1280, False), (9, 2560, 1280, False), (1, 1280, 3840, False), (1, 1280, 1280, False),
         (1, 1280, 5120, True), (1, 5120, 1280, False)),
        24, (4, 6, 7, 9, 10, 12, 14, 15, 17, 19, 24),
    ),
)  # fmt: skip


def _across(rows: int, filters: int, channels: int, warps: int, stages: int) -> Tile:
    return Tile(rows, filters, channels, warps, stages, across=True)


#: Tiles worth trying on Hopper, each with the stages of its software pipeline for geglu, which loads two weights a
#: step; 0 leaves the tile out for geglu.
_CANDIDATE_TILES = (
    (Tile(128, 256, 64, 8, 3), 0), (Tile(128, 128, 64, 8, 3), 3), (Tile(128, 128, 64, 4, 3), 0),
    (Tile(128, 64, 64, 4, 4), 3), (Tile(128, 64, 128, 4, 3), 0), (Tile(64, 256, 64, 8, 4), 3),
    (Tile(64, 128, 64, 4, 4), 4), (Tile(64, 128, 128, 4, 3), 0), (Tile(64, 64, 64, 4, 4), 3),
    (Tile(64, 64, 128, 4, 3), 4), (Tile(32, 128, 64, 4, 4), 4), (Tile(16, 64, 64, 4, 5), 3),
    (Tile(16, 128, 128, 4, 5), 0),
    (_across(144, 128, 64, 4, 3), 0), (_across(128, 128, 64, 8, 4), 3), (_across(128, 128, 64, 4, 4), 0),
    (_across(96, 128, 64, 4, 3), 0), (_across(80, 128, 64, 4, 4), 0), (_across(96, 64, 64, 4, 5), 0),
    (_across(64, 128, 64, 4, 5), 4), (_across(64, 64, 64, 4, 6), 4), (_across(64, 64, 128, 4, 4), 0),
    (_across(48, 64, 128, 4, 4), 0), (_across(32, 128, 64, 4, 6), 3), (_across(32, 64, 128, 4, 5), 0),
    (_across(16, 64, 128, 4, 5), 0), (_across(16, 64, 64, 4, 6), 5),
)  # fmt: skip
#: How often the sum over the depth is split, and whether a second kernel adds up the parts.
_SPLITS = (
    (1, False), (2, False), (4, False),
    (2, True), (3, True), (4, True), (6, True), (8, True), (10, True), (13, True), (20, True),
)  # fmt: skip
#: Multiprocessors of an H100 or H200.
_MULTIPROCESSORS = 132

#: A step of a U-Net never finds its weights in a cache, so the launches of one graph have different weights that amount
#: to about this many bytes.
_WEIGHT_BYTES_OF_GRAPH = 150e6
#: Launches of one graph: with large weights, of which few fill those bytes, and with small ones.
_LAUNCHES = 8, 24


@dataclass(frozen=True)
class Product:
    """The sizes of one product: ``rows`` of ``taps * channels`` values by ``filters`` outputs (after ``geglu``)."""

    rows: int
    taps: int
    channels: int
    filters: int
    geglu: bool

    @property
    def depth(self) -> int:
        return self.taps * self.channels

    def tiles(self) -> Iterator[Tile]:
        """The tiles and splits that may be fastest: none that would leave most of the GPU, or of a tile, idle."""
        for tile, geglu_stages in _CANDIDATE_TILES:
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
                if splits > 1 and not second_kernel and (tile.rows * tile.filters > 128 * 64 or tile.more_rows):
                    continue  # a single program would have too much to add up, or is not able to
                if 2 * programs * splits < _MULTIPROCESSORS and (splits >= 6 or steps >= 12 * splits):
                    continue  # most multiprocessors are idle, and more splits are among the candidates
                if splits > 1 and programs > _MULTIPROCESSORS:
                    continue
                yield replace(tile, stages=stages, splits=splits, second_kernel=second_kernel)


@dataclass
class _Inputs:
    """What a product reads; ``epilogue`` has the arguments from ``count`` on, as most layers of a U-Net have them."""

    rows: Tensor
    halo: Tensor | None
    weights: list[Tensor]
    bias: Tensor
    table: Tensor | None
    epilogue: tuple[Any, ...]

    @classmethod
    def of(cls, product: Product, side: int, device: torch.device, dtype: torch.dtype) -> _Inputs:
        """Random inputs for a square mask of ``product.rows`` rows in maps of ``side`` x ``side`` pixels."""

        def fresh(*shape: int) -> Tensor:
            return normal(*shape, device=device, dtype=dtype)

        mask = square(product.rows / (BATCH * side * side), side, device)
        assert len(mask.index) == product.rows
        filters = product.filters * (2 if product.geglu else 1)
        copies = max(3, min(_LAUNCHES[1], int(_WEIGHT_BYTES_OF_GRAPH // (filters * product.depth * dtype.itemsize))))
        weights = [fresh(filters, product.depth) / product.depth**0.5 for _ in range(copies)]
        bias, count = fresh(filters), torch.tensor([product.rows], dtype=torch.int32, device=device)
        if product.taps == 1:
            rest = (None,) * 5
            epilogue = (count, *rest, "geglu") if product.geglu else (count, None, None, fresh(product.rows, filters))
            return cls(fresh(product.rows, product.channels), None, weights, bias, None, epilogue)
        rows, halo, _, _, table = convolution_inputs(mask, side, product.channels, 1, dtype)
        scale, shift = (fresh(BATCH, filters).float() for _ in range(2))
        norm = (count, mask.sample, fresh(BATCH, filters), None, scale, shift, "silu")
        return cls(rows, halo, weights, bias, table, norm)


def sweep(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[list[dict[str, Any]], int]:
    """Time every tile at every size; after ``seconds`` the sizes that are left are skipped.

    Returns:
        For each size what ``row_product_tiles.json`` holds of it: the size, the fastest tile, and the microseconds of
        that tile and of cuBLAS; and the number of sizes skipped.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    products = [
        (Product(BATCH * square_side**2, *each), side)
        for kinds, side, square_sides in _PRODUCTS
        for each in kinds
        for square_side in square_sides
    ]
    _compile(products, device, dtype)
    found, skipped = [], 0
    for product, side in products:
        if time.perf_counter() - start > seconds:
            skipped += 1
            continue
        inputs = _Inputs.of(product, side, device, dtype)
        times = {tile: _time(product, inputs, tile, 3) for tile in product.tiles()}
        fastest = sorted(times, key=lambda tile: times[tile])[:3]
        times = {tile: _time(product, inputs, tile, 9) for tile in fastest}
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
        measured = {"us": times[best], "library_us": replay_microseconds(library, _launches(inputs))}
        found.append({**size, **asdict(best), **{name: round(us, 2) for name, us in measured.items()}})
    return found, skipped


def _compile(products: list[tuple[Product, int]], device: torch.device, dtype: torch.dtype) -> None:
    """Compile every kernel that will be timed, several at once on all processors."""
    done: set[tuple[Any, ...]] = set()
    with compiling_alone():
        for product, side in products:
            inputs = None
            for tile in product.tiles():
                # A kernel is compiled for each of these; where a second kernel adds up the splits, only that one is
                # compiled for their number.
                kind = (product.taps, product.geglu, product.channels % tile.channels, product.rows == BATCH * side**2)
                kernels: set[tuple[Any, ...]] = {(*kind, replace(tile, splits=2) if tile.second_kernel else tile)}
                if tile.second_kernel:
                    kernels.add((*kind, tile.splits))
                if not kernels <= done:
                    inputs = inputs or _Inputs.of(product, side, device, dtype)
                    _launch(product, inputs, tile, 0)
                done |= kernels


def _launch(product: Product, inputs: _Inputs, tile: Tile, i: int) -> None:
    weight = inputs.weights[i % len(inputs.weights)]
    launch_row_product(
        "sweep", inputs.rows, inputs.halo, weight, inputs.bias, inputs.table, *inputs.epilogue, keep_raw=False,
        tile=tile,
    )  # fmt: skip


def _launches(inputs: _Inputs) -> int:
    return _LAUNCHES[len(inputs.weights) > _LAUNCHES[0]]


def _time(product: Product, inputs: _Inputs, tile: Tile, rounds: int) -> float:
    """The microseconds of one launch, with an epilogue and weights that are in no cache, as in a step."""
    return replay_microseconds(lambda i: _launch(product, inputs, tile, i), _launches(inputs), rounds)
