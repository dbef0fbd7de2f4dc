"""The product of rows with a weight as one implicit GEMM on the GPU: convolution and linear layer, with their epilogue.

A program computes a tile [rows, filters] of the output in a loop over the taps and their channels. A step reads the
tap's entries of the neighbour table, the rows that they name, and the weights. The matrix of gathered neighbours, which
a convolution would multiply, is never stored. A linear layer has one tap, the row itself, and no table.

Where the output has too few tiles to fill the GPU, several programs split the loop of a tile and leave partial sums in
memory. If these are few and small, the program that comes last adds them and goes on to the epilogue; if not, a second
kernel adds them with all multiprocessors. Either way they are added in a fixed order, so that a result has the same
bits in every run.

The launcher hands a linear layer of many rows to cuBLAS instead, where that was measured to be faster.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fisedit_compile.kernels.implicit_gemm.row_product_finish_triton import finish, sum_of_parts
from fisedit_compile.kernels.implicit_gemm.row_product_sources_triton import filter_values, places, row_values
from fisedit_compile.kernels.launch.real_rows_triton import real_rows


@triton.jit
def _multiplied(rows, filters, total, ACROSS: tl.constexpr, PRECISION: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total`` plus the product of a step: fp32 [BM, BN], across [BN, BM]."""
    if ACROSS:
        total = tl.dot(filters, rows, total, input_precision=PRECISION)
    else:
        total = tl.dot(rows, filters, total, input_precision=PRECISION)
    return total


@triton.jit
def _store_part(part, total, m, n, inside, width):  # type: ignore[no-untyped-def]
    """Store the partial sum of a tile, rows m [BM] and filters n [BN], where the second kernel reads it."""
    at = part + m.to(tl.int64)[:, None] * width + n[None, :]
    tl.store(at, total.to(part.dtype.element_ty), mask=inside[:, None] & (n < width)[None, :])


@triton.jit(do_not_specialize=["padded", "active", "span"])
def row_product_kernel(
    rows: tl.tensor,  # [active, channels]
    halo: tl.tensor,  # [Hh, channels] or None
    shortcut: tl.tensor,  # [padded, shortcut_channels] or None; None for a linear layer
    zeros: tl.tensor,  # [channels] zeros, the values of a neighbour outside the picture; None without a table
    weight: tl.tensor,  # [filters, TAPS * channels]; for geglu the filters of the values, then those of the gates
    shortcut_weight: tl.tensor,  # [filters, shortcut_channels] or None; for geglu in the same order
    table: tl.tensor,  # int32 [padded, TAPS]; None: one tap, the row itself
    count: tl.tensor,  # int32 [1] or None: how many of the output's rows are real
    bias: tl.tensor,  # [filters] or None; this and the next five are the arguments of the epilogue
    sample: tl.tensor,  # int64 [padded] or None
    sample_bias: tl.tensor,  # [B, filters] or None
    residual: tl.tensor,  # [padded, filters] or None
    scale: tl.tensor,  # fp32 [B, filters] or None
    shift: tl.tensor,  # fp32 [B, filters] or None
    raw: tl.tensor,  # [padded, filters] or None: the result before norm and activation
    out: tl.tensor,  # [padded, width]
    parts: tl.tensor,  # partial sums [tiles, SPLITS, BM, BN], or for a second kernel [splits, padded, width], or None
    arrived: tl.tensor,  # int32 [tiles], zeros before and after a launch; None: a second kernel adds the parts
    padded: tl.tensor,  # how many rows there are, those of padding included
    active: tl.tensor,  # how many rows ``rows`` has; entries of the table from here on name halo rows
    channels: tl.tensor,
    shortcut_channels: tl.tensor,  # 0 without ``shortcut``
    width: tl.tensor,  # columns of the output: filters, or half of them for geglu
    row_stride: tl.tensor,  # elements from a row to the next
    span: tl.tensor,  # steps of the loop that a split takes
    TAPS: tl.constexpr,
    BM: tl.constexpr,  # rows of a tile, or the larger part of them
    MORE: tl.constexpr,  # rows of a tile beyond BM, a power of two as well; 0: none
    BN: tl.constexpr,  # filters of a tile
    BK: tl.constexpr,  # channels of a step
    ACROSS: tl.constexpr,  # filters run down the product, and rows across; see ``Tile``
    GROUP: tl.constexpr,  # tiles of rows that are computed for all filters before the next begin
    WHOLE: tl.constexpr,  # BK divides the channels, and those of the shortcut
    ALIGNED: tl.constexpr,  # every row that is read starts at a multiple of 16 bytes
    SPLITS: tl.constexpr,  # splits of a tile; with a second kernel 2 for any number, so that all share their code
    HALVES: tl.constexpr,  # the epilogue runs in two halves
    SILU: tl.constexpr,
    GEGLU: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    real = real_rows(padded, count)
    row_tiles = tl.cdiv(real, BM + MORE)
    filter_tiles = tl.cdiv(width, BN)
    tile = tl.program_id(0)
    if tile >= row_tiles * filter_tiles:  # all its rows are padding
        return
    group = tile // (GROUP * filter_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile - group * GROUP * filter_tiles
    first_row = (group * GROUP + within % height) * (BM + MORE)
    m = first_row + tl.arange(0, BM)  # [BM]
    n = (within // height) * BN + tl.arange(0, BN)  # [BN]
    inside = m < real

    step = tl.arange(0, BK)
    # A tile's rows and filters past the last ones read values of others, and their products are never stored. So the
    # loop needs no mask for them.
    row, column = m % real, n % width  # [BM], [BN]
    conv_steps = TAPS * tl.cdiv(channels, BK)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, conv_steps + tl.cdiv(shortcut_channels, BK))
    total = tl.zeros((BN, BM) if ACROSS else (BM, BN), dtype=tl.float32)
    gate = total
    # ``at`` is where the table has the entries of each row, and ``entry`` the entry of the tap that comes next; without
    # a table ``at`` is the row itself. Entries are read a step ahead. A load of rows that waits for entries of its own
    # step would need stages of the software pipeline for both, and half as many rows would be in flight.
    at, entry = places(rows, table, row, row_stride, begin, TAPS, ALIGNED)
    if MORE > 0:
        more_m = first_row + BM + tl.arange(0, MORE)  # [MORE]
        more_inside = more_m < real
        more_total = tl.zeros((BN, MORE) if ACROSS else (MORE, BN), dtype=tl.float32)
        more_row = more_m % real
        more_at, more_entry = places(rows, table, more_row, row_stride, begin, TAPS, ALIGNED)
    for i in range(begin, end):
        # All taps of some channels come before the next channels: neighbouring rows read the same values, which are in
        # the L2 cache then.
        tap, first, last = i % TAPS, (i // TAPS) * BK, channels
        in_shortcut = False
        if shortcut is not None:
            in_shortcut = i >= conv_steps
            first = tl.where(in_shortcut, (i - conv_steps) * BK, first)
            last = tl.where(in_shortcut, shortcut_channels, last)
        # Filters come first: their copies do not wait for the addresses of rows, which go from thread to thread.
        b = filter_values(
            weight, shortcut_weight, column, in_shortcut, tap, channels, shortcut_channels, first, last, step, TAPS,
            ALIGNED, WHOLE, ACROSS,
        )  # fmt: skip
        a = row_values(
            rows, halo, shortcut, zeros, at, entry, row, in_shortcut, active, row_stride, channels, shortcut_channels,
            first, last, step, table is not None, ALIGNED, WHOLE, ACROSS,
        )  # fmt: skip
        if MORE > 0:
            more = row_values(
                rows, halo, shortcut, zeros, more_at, more_entry, more_row, in_shortcut, active, row_stride,
                channels, shortcut_channels, first, last, step, table is not None, ALIGNED, WHOLE, ACROSS,
            )  # fmt: skip
        if table is not None:
            entry = tl.load(at + (i + 1) % TAPS)
            if MORE > 0:
                more_entry = tl.load(more_at + (i + 1) % TAPS)
        total = _multiplied(a, b, total, ACROSS, PRECISION)
        if MORE > 0:
            more_total = _multiplied(more, b, more_total, ACROSS, PRECISION)
        if GEGLU:
            g = filter_values(
                weight, shortcut_weight, column + width, in_shortcut, tap, channels, shortcut_channels, first, last,
                step, TAPS, ALIGNED, WHOLE, ACROSS,
            )  # fmt: skip
            gate = _multiplied(a, g, gate, ACROSS, PRECISION)
    if ACROSS:
        total = tl.trans(total)
        if GEGLU:
            gate = tl.trans(gate)
        if MORE > 0:
            more_total = tl.trans(more_total)

    if SPLITS > 1 and arrived is None:
        # [splits, padded, width]: each split stores its sums as the output lies.
        size = padded.to(tl.int64) * width
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
            tl.debug_barrier()  # all threads of the program have stored before one of them counts it as arrived
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
            if first_row + BM < real:  # the epilogue looks for the rows' samples, so there must be a row
                finish(
                    more_total, more_total, more_m, (within // height) * BN, more_inside, width, bias, sample,
                    sample_bias, residual, scale, shift, raw, out, SILU, GEGLU, HALVES,
                )  # fmt: skip
