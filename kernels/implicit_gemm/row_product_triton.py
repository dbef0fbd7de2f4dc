"""The product of rows with a weight as one implicit GEMM on the GPU: convolution and linear layer, with their epilogue.

A program computes a tile [rows, filters] of the output in a loop over the taps and their channels: it reads the tap's
entries of the neighbour table, the rows that they name, and the weights; columns are never stored. A linear layer has
one tap, the row itself, and no table. Where the output has too few tiles to fill the GPU, several programs split the
loop of a tile and leave partial sums in memory. Few and small ones are added by the program that comes last, which
goes on to the epilogue; many by a second kernel, which reads them with all multiprocessors. Either way they are added
in a fixed order, so that a result is the same bits in every run.

A linear layer of many rows is cuBLAS's where that was measured to be the faster of the two, with the epilogue in a
kernel behind it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fisedit_compile.kernels.implicit_gemm.row_product_finish_triton import finish, sum_of_parts
from fisedit_compile.kernels.implicit_gemm.row_product_sources_triton import filter_values, places, row_values


@triton.jit
def _multiplied(rows, filters, total, ACROSS: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    if ACROSS:
        total = tl.dot(filters, rows, total, input_precision=PRECISION)
    else:
        total = tl.dot(rows, filters, total, input_precision=PRECISION)
    return total


@triton.jit
def _store_part(part, total, m, n, inside, width):  # type: ignore[no-untyped-def]
    at = part + m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(at, total.to(part.dtype.element_ty), mask=inside[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=["there", "active", "span"])
def row_product_kernel(
    rows: tl.tensor,  # [active, channels]
    halo: tl.tensor,  # [Hh, channels] or None
    beside: tl.tensor,  # [there, side_channels] or None; with a table alone
    weight: tl.tensor,  # [filters, TAPS * channels]; for geglu the values' filters, then the gates'
    side_weight: tl.tensor,  # [filters, side_channels] or None, likewise
    table: tl.tensor,  # int32 [there, TAPS]; None: one tap, the row itself
    count: tl.tensor,  # int32 [1] or None: how many of the output's rows are real
    bias: tl.tensor,  # [filters] or None; this and the next five are the epilogue's
    sample: tl.tensor,  # int64 [there] or None
    sample_bias: tl.tensor,  # [B, filters] or None
    residual: tl.tensor,  # [there, filters] or None
    scale: tl.tensor,  # fp32 [B, filters] or None
    shift: tl.tensor,  # fp32 [B, filters] or None
    raw: tl.tensor,  # [there, filters] or None: the result before norm and activation
    out: tl.tensor,  # [there, width]
    parts: tl.tensor,  # [SPLITS, tiles, BM, BN] or None; for geglu the gates' behind the values'
    arrived: tl.tensor,  # int32 [tiles], zeros before and after; None: a second kernel adds the parts
    there: tl.tensor,
    active: tl.tensor,
    channels: tl.tensor,
    side_channels: tl.tensor,  # 0 without ``beside``
    width: tl.tensor,  # of the output: filters, or half of them for geglu
    row_stride: tl.tensor,  # elements from a row to the next
    span: tl.tensor,  # steps of the loop that a split takes
    TAPS: tl.constexpr,
    BM: tl.constexpr,
    MORE: tl.constexpr,  # rows of the tile beyond BM, itself a power of two; 0: none
    BN: tl.constexpr,
    BK: tl.constexpr,
    ACROSS: tl.constexpr,  # whether filters run down the product, and rows across; see ``Tile``
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,  # BK divides channels, and those of ``beside``
    ALIGNED: tl.constexpr,  # every row that is read starts at a multiple of 16 bytes
    SPLITS: tl.constexpr,  # with a second kernel any number over 1, so that all splits share their code
    HALVES: tl.constexpr,
    SILU: tl.constexpr,
    GEGLU: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    real = there
    if count is not None:
        real = tl.minimum(there, tl.load(count))
    row_tiles = tl.cdiv(real, BM + MORE)
    filter_tiles = tl.cdiv(width, BN)
    tile = tl.program_id(0)
    if tile >= row_tiles * filter_tiles:  # padding
        return
    group = tile // (GROUP * filter_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile - group * GROUP * filter_tiles
    first_row = (group * GROUP + within % height) * (BM + MORE)
    m = first_row + tl.arange(0, BM)  # [BM]
    n = (within // height) * BN + tl.arange(0, BN)  # [BN]
    inside = m < real

    step = tl.arange(0, BK)
    # Filters past the last read real weights, whose products are never stored: no mask in the loop.
    read = (n % width).to(tl.int64)  # [BN]
    conv_steps = TAPS * tl.cdiv(channels, BK)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, conv_steps + tl.cdiv(side_channels, BK))
    total = tl.zeros((BN, BM) if ACROSS else (BM, BN), dtype=tl.float32)
    gate = total
    # Where the table's entries of a row are, and the entry of the first tap: they are read a step ahead, as a load of
    # rows that waits for its entries in its own step would need stages of the software pipeline for both, and half as
    # many rows would be in flight. Without a table, where the row is.
    at, entry = places(rows, table, m, inside, real, row_stride, begin, TAPS, ALIGNED)
    if MORE > 0:
        more_m = first_row + BM + tl.arange(0, MORE)  # [MORE]
        more_inside = more_m < real
        more_total = tl.zeros((BN, MORE) if ACROSS else (MORE, BN), dtype=tl.float32)
        more_at, more_entry = places(rows, table, more_m, more_inside, real, row_stride, begin, TAPS, ALIGNED)
    for i in range(begin, end):
        # Taps inside channels: neighbours share their rows' channels, which then come from L2 and not from memory.
        tap, first, last = i % TAPS, (i // TAPS) * BK, channels
        aside = False
        if beside is not None:
            aside = i >= conv_steps
            first = tl.where(aside, (i - conv_steps) * BK, first)
            last = tl.where(aside, side_channels, last)
        a = row_values(
            rows, halo, beside, at, entry, m, inside, aside, active, row_stride, channels, side_channels, first, last,
            step, table is not None, ALIGNED, WHOLE, ACROSS,
        )  # fmt: skip
        if MORE > 0:
            more = row_values(
                rows, halo, beside, more_at, more_entry, more_m, more_inside, aside, active, row_stride, channels,
                side_channels, first, last, step, table is not None, ALIGNED, WHOLE, ACROSS,
            )  # fmt: skip
        if table is not None:
            entry = tl.load(at + (i + 1) % TAPS, mask=inside, other=-1)
            if MORE > 0:
                more_entry = tl.load(more_at + (i + 1) % TAPS, mask=more_inside, other=-1)
        b = filter_values(
            weight, side_weight, read, aside, tap, channels, side_channels, first, last, step, TAPS, ALIGNED, WHOLE,
            ACROSS,
        )  # fmt: skip
        total = _multiplied(a, b, total, ACROSS, PRECISION)
        if MORE > 0:
            more_total = _multiplied(more, b, more_total, ACROSS, PRECISION)
        if GEGLU:
            g = filter_values(
                weight, side_weight, read + width, aside, tap, channels, side_channels, first, last, step, TAPS,
                ALIGNED, WHOLE, ACROSS,
            )  # fmt: skip
            gate = _multiplied(a, g, gate, ACROSS, PRECISION)
    if ACROSS:
        total = tl.trans(total)
        if GEGLU:
            gate = tl.trans(gate)
        if MORE > 0:
            more_total = tl.trans(more_total)

    if SPLITS > 1 and arrived is None:
        # As the output lies: [SPLITS, there, width]
        size = there.to(tl.int64) * width
        part = parts + tl.program_id(1) * size
        _store_part(part, total, m, n, inside, width)
        if MORE > 0:
            _store_part(part, more_total, more_m, n, more_inside, width)
        if GEGLU:
            _store_part(part + tl.num_programs(1) * size, gate, m, n, inside, width)
    else:
        if SPLITS > 1:
            SIZE: tl.constexpr = BM * BN
            PLACES: tl.constexpr = SPLITS * 2 if GEGLU else SPLITS
            within_tile = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
            part = parts + tile.to(tl.int64) * (PLACES * SIZE) + within_tile
            tl.store(part + tl.program_id(1) * SIZE, total.to(part.dtype.element_ty))
            if GEGLU:
                tl.store(part + (SPLITS + tl.program_id(1)) * SIZE, gate.to(part.dtype.element_ty))
            tl.debug_barrier()  # all threads have stored before one of them says so
            before = tl.atomic_add(arrived + tile, 1, sem="acq_rel", scope="gpu")
            if before != SPLITS - 1:
                return
            tl.store(arrived + tile, 0)  # for the next launch
            total = sum_of_parts(part, SIZE, None, SPLITS)
            if GEGLU:
                gate = sum_of_parts(part + SPLITS * SIZE, SIZE, None, SPLITS)
        finish(
            total, gate, m, (within // height) * BN, inside, width, bias, sample, sample_bias, residual, scale, shift,
            raw, out, SILU, GEGLU, HALVES,
        )  # fmt: skip
        if MORE > 0:  # noqa: SIM102 - Triton compiles no branch that a constant rules out
            if first_row + BM < real:  # an epilogue reads what a sample has: there must be a row
                finish(
                    more_total, more_total, more_m, (within // height) * BN, more_inside, width, bias, sample,
                    sample_bias, residual, scale, shift, raw, out, SILU, GEGLU, HALVES,
                )  # fmt: skip
