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


@triton.jit
def sum_of_parts(part, step, valid, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Partial sums, added in the order of the splits; past the first-level cache, which may be stale."""
    total = tl.load(part, mask=valid, cache_modifier=".cg").to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(part + split * step, mask=valid, cache_modifier=".cg").to(tl.float32)
    return total


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and the right half of [BM, BN]; which register is whose changes, nothing moves."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _erf(x):  # type: ignore[no-untyped-def]
    """erf within 1.5e-7 (Abramowitz and Stegun, 7.1.26) in 15 instructions; libdevice's has 80, more than the rest."""
    size = tl.abs(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    value = 1.0 - series * tl.exp(-size * size)
    return tl.where(x < 0.0, -value, value)


@triton.jit
def _finish(  # type: ignore[no-untyped-def]
    total, gate, m, n, inside, width, bias, sample, sample_bias, residual, scale, shift, raw, out,
    SILU: tl.constexpr, GEGLU: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile: total and gate fp32 [BM, BN], m and inside [BM], n [BN]; see ``epilogue``."""
    valid = n < width
    stored = inside[:, None] & valid[None, :]
    at = m.to(tl.int64)[:, None] * width + n[None, :]  # [BM, BN]
    if bias is not None:
        total += tl.load(bias + n, mask=valid, other=0.0).to(tl.float32)[None, :]
    if GEGLU:
        if bias is not None:
            gate += tl.load(bias + width + n, mask=valid, other=0.0).to(tl.float32)[None, :]
        total *= gate * 0.5 * (1.0 + _erf(gate * 0.7071067811865476))
    if sample is not None:
        # What a sample has is a vector [BN], read once for each sample of the tile's rows: mostly one, seldom two. Read
        # as [BM, BN] it does not fit the registers beside the sum.
        owner = tl.load(sample + m, mask=inside, other=-1).to(tl.int32)
        last_owner = tl.max(owner, axis=0)
        first_owner = tl.min(tl.where(inside, owner, last_owner), axis=0)
        if sample_bias is not None:
            for each in range(first_owner, last_owner + 1):
                vector = tl.load(sample_bias + each * width + n, mask=valid, other=0.0).to(tl.float32)
                total += tl.where((owner == each)[:, None], vector[None, :], 0.0)
    if residual is not None:
        total += tl.load(residual + at, mask=stored, other=0.0).to(tl.float32)
    if raw is not None:
        tl.store(raw + at, total.to(raw.dtype.element_ty), mask=stored)
    if scale is not None:
        for each in range(first_owner, last_owner + 1):
            factor = tl.load(scale + each * width + n, mask=valid, other=0.0).to(tl.float32)
            term = tl.load(shift + each * width + n, mask=valid, other=0.0).to(tl.float32)
            total = tl.where((owner == each)[:, None], total * factor[None, :] + term[None, :], total)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["there", "active", "span"])
def row_product_kernel(
    rows: tl.tensor,  # [active, channels]
    halo: tl.tensor,  # [Hh, channels] or None
    weight: tl.tensor,  # [filters, TAPS * channels]; for geglu the values' filters, then the gates'
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
    width: tl.tensor,  # of the output: filters, or half of them for geglu
    row_stride: tl.tensor,  # elements from a row to the next
    span: tl.tensor,  # steps of the loop that a split takes
    TAPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,  # BK divides channels
    ALIGNED: tl.constexpr,  # every row and halo row starts at a multiple of 16 bytes
    SPLITS: tl.constexpr,  # with a second kernel any number over 1, so that all splits share their code
    HALVES: tl.constexpr,
    SILU: tl.constexpr,
    GEGLU: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    real = there
    if count is not None:
        real = tl.minimum(there, tl.load(count))
    row_tiles = tl.cdiv(real, BM)
    filter_tiles = tl.cdiv(width, BN)
    tile = tl.program_id(0)
    if tile >= row_tiles * filter_tiles:  # padding
        return
    group = tile // (GROUP * filter_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile - group * GROUP * filter_tiles
    m = (group * GROUP + within % height) * BM + tl.arange(0, BM)  # [BM]
    n = (within // height) * BN + tl.arange(0, BN)  # [BN]
    inside = m < real

    step = tl.arange(0, BK)
    # Filters past the last read real weights, whose products are never stored: no mask in the loop.
    weights = weight + (n % width).to(tl.int64)[None, :] * (TAPS * channels) + step[:, None]  # [BK, BN]
    gates = weights + width.to(tl.int64) * (TAPS * channels)  # read for geglu alone
    chunks = tl.cdiv(channels, BK)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, TAPS * chunks)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    gate = total
    if table is not None:
        # Entries are read a step ahead: a load of rows that waits for its entries in its own step would need stages of
        # the software pipeline for both, and half as many rows would be in flight.
        entries = table + m.to(tl.int64) * TAPS  # [BM]
        entry = tl.load(entries + begin % TAPS, mask=inside, other=-1)  # [BM]
    else:
        # Rows past the last read a real one, as filters do.
        own = rows + tl.minimum(m, real - 1).to(tl.int64) * row_stride  # [BM]
        if ALIGNED:
            own = tl.multiple_of(own, [16])
    for i in range(begin, end):
        # Taps inside channels: neighbours share their rows' channels, which then come from L2 and not from memory.
        tap = i % TAPS
        first = (i // TAPS) * BK
        valid = first + step < channels
        if table is not None:
            source = rows + entry.to(tl.int64) * row_stride
            if halo is not None:
                source = tl.where(entry < active, source, halo + (entry - active).to(tl.int64) * channels)
            if ALIGNED:  # a choice of two pointers hides it, and unaligned loads are narrow and not pipelined
                source = tl.multiple_of(source, [16])
            present = (entry >= 0)[:, None]
            if not WHOLE:
                present = present & valid[None, :]
            a = tl.load(source[:, None] + (first + step)[None, :], mask=present, other=0.0)  # [BM, BK]
            entry = tl.load(entries + (i + 1) % TAPS, mask=inside, other=-1)
        elif WHOLE:
            a = tl.load(own[:, None] + (first + step)[None, :])
        else:
            a = tl.load(own[:, None] + (first + step)[None, :], mask=valid[None, :], other=0.0)
        at_step = tap * channels + first
        if WHOLE:  # noqa: SIM108 - Triton compiles one branch alone
            b = tl.load(weights + at_step)  # [BK, BN]
        else:
            b = tl.load(weights + at_step, mask=valid[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        if GEGLU:
            if WHOLE:  # noqa: SIM108
                g = tl.load(gates + at_step)
            else:
                g = tl.load(gates + at_step, mask=valid[:, None], other=0.0)
            gate = tl.dot(a, g, gate, input_precision=PRECISION)

    if SPLITS > 1 and arrived is None:
        # As the output lies: [SPLITS, there, width]
        stored = inside[:, None] & (n < width)[None, :]
        size = there.to(tl.int64) * width
        part = parts + m.to(tl.int64)[:, None] * width + n[None, :] + tl.program_id(1) * size
        tl.store(part, total.to(part.dtype.element_ty), mask=stored)
        if GEGLU:
            tl.store(part + tl.num_programs(1) * size, gate.to(part.dtype.element_ty), mask=stored)
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
        if HALVES:
            # One after the other: a whole tile and what its epilogue reads do not fit the registers.
            left, right = _halves(total, BM, BN)
            left_gate, right_gate = _halves(gate, BM, BN) if GEGLU else (left, right)
            n = (within // height) * BN + tl.arange(0, BN // 2)
            _finish(
                left, left_gate, m, n, inside, width, bias, sample, sample_bias, residual, scale, shift, raw, out,
                SILU, GEGLU,
            )  # fmt: skip
            _finish(
                right, right_gate, m, n + BN // 2, inside, width, bias, sample, sample_bias, residual, scale, shift,
                raw, out, SILU, GEGLU,
            )  # fmt: skip
        else:
            _finish(
                total, gate, m, n, inside, width, bias, sample, sample_bias, residual, scale, shift, raw, out,
                SILU, GEGLU,
            )  # fmt: skip


@triton.jit(do_not_specialize=["there"])
def finish_kernel(
    parts: tl.tensor,  # [SPLITS, there, width]: partial sums, fp32, or a whole product
    count: tl.tensor,  # int32 [1] or None
    bias: tl.tensor,
    sample: tl.tensor,
    sample_bias: tl.tensor,
    residual: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    raw: tl.tensor,
    out: tl.tensor,
    there: tl.tensor,
    width: tl.tensor,
    part_stride: tl.tensor,  # elements from a row of parts to the next
    to_gate: tl.tensor,  # elements from a value to its gate, for geglu
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    SILU: tl.constexpr,
    GEGLU: tl.constexpr,
) -> None:
    real = there
    if count is not None:
        real = tl.minimum(there, tl.load(count))
    if tl.program_id(0) * BM >= real:
        return
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    n = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    size = there.to(tl.int64) * width
    # Rows past the last read a real sum, which is not stored. Filters do not: the least of two would hide from the
    # compiler that they lie side by side, and loads would be of single values.
    part = parts + tl.minimum(m, real - 1).to(tl.int64)[:, None] * part_stride + n[None, :]
    valid = (n < width)[None, :]
    total = sum_of_parts(part, size, valid, SPLITS)
    gate = sum_of_parts(part + to_gate, size, valid, SPLITS) if GEGLU else total
    _finish(
        total, gate, m, n, m < real, width, bias, sample, sample_bias, residual, scale, shift, raw, out, SILU, GEGLU
    )
