"""What follows the sums of a product of rows: its epilogue, in the kernel of the product or in a second one behind it.

The second kernel adds the partial sums of splits with all multiprocessors, or finishes what cuBLAS multiplied.
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
def _epilogue(  # type: ignore[no-untyped-def]
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


@triton.jit
def finish(  # type: ignore[no-untyped-def]
    total, gate, m, first_filter, inside, width, bias, sample, sample_bias, residual, scale, shift, raw, out,
    SILU: tl.constexpr, GEGLU: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, its rows m [BM] and filters from ``first_filter`` on.

    In halves, one after the other, where a whole tile and what its epilogue reads do not fit the registers.
    """
    BM: tl.constexpr = total.shape[0]
    BN: tl.constexpr = total.shape[1]
    if HALVES:
        left, right = _halves(total, BM, BN)
        left_gate, right_gate = _halves(gate, BM, BN) if GEGLU else (left, right)
        n = first_filter + tl.arange(0, BN // 2)
        _epilogue(
            left, left_gate, m, n, inside, width, bias, sample, sample_bias, residual, scale, shift, raw, out, SILU,
            GEGLU,
        )  # fmt: skip
        _epilogue(
            right, right_gate, m, n + BN // 2, inside, width, bias, sample, sample_bias, residual, scale, shift, raw,
            out, SILU, GEGLU,
        )  # fmt: skip
    else:
        n = first_filter + tl.arange(0, BN)
        _epilogue(
            total, gate, m, n, inside, width, bias, sample, sample_bias, residual, scale, shift, raw, out, SILU, GEGLU
        )


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
    finish(
        total, gate, m, tl.program_id(1) * BN, m < real, width, bias, sample, sample_bias, residual, scale, shift, raw,
        out, SILU, GEGLU, HALVES=False,
    )  # fmt: skip
