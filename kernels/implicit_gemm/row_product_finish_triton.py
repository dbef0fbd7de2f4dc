"""The epilogue of a product of rows, which its own kernel runs or a second kernel behind it.

The second kernel adds the partial sums of splits, or takes a product that cuBLAS multiplied. ``epilogue`` says what an
epilogue computes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fisedit_compile.kernels.launch.real_rows_triton import real_rows


@triton.jit
def sum_of_parts(part, step, valid, SPLITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sum of a tile's partial sums, fp32, in the order of the splits.

    Args:
        part: addresses of the first split's values.
        step: elements from a split's value to that of the next split.
        valid: which values exist; None for all.
    """
    # The loads go past the first-level cache, which may hold what was there before another program stored its part.
    total = tl.load(part, mask=valid, cache_modifier=".cg").to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(part + split * step, mask=valid, cache_modifier=".cg").to(tl.float32)
    return total


@triton.jit
def _halves(tile, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The left and the right half of a tile [BM, BN], each [BM, BN / 2]. No value moves to another register."""
    return tl.split(tl.permute(tl.reshape(tile, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def _erf(x):  # type: ignore[no-untyped-def]
    """The error function to within 1.5e-7 (Abramowitz and Stegun, 7.1.26).

    It takes 15 instructions. That of libdevice takes 80, more than the rest of the epilogue.
    """
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
    """The epilogue of a tile: sums ``total`` and, for geglu, ``gate`` fp32 [BM, BN], of rows m [BM] and filters n [BN].

    ``inside`` [BM] says which rows are real; others are not stored.
    """
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
        # sample_bias, scale and shift are one vector [BN] a sample. They are read once for each sample that the tile
        # has rows of, mostly one and seldom two: read for each row, as [BM, BN], they would not fit the registers.
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
    """The epilogue of a tile [BM, BN] of rows m [BM] and of the filters from ``first_filter`` on.

    With HALVES it runs twice, for half of the filters each time: for a tile that would not fit the registers together
    with what its epilogue reads.
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


@triton.jit(do_not_specialize=["padded"])
def finish_kernel(
    parts: tl.tensor,  # [SPLITS, padded, width]: partial sums, fp32, or a whole product
    count: tl.tensor,  # int32 [1] or None: how many of the rows are real
    bias: tl.tensor,  # this and the next five are the arguments of the epilogue, as of ``row_product_kernel``
    sample: tl.tensor,
    sample_bias: tl.tensor,
    residual: tl.tensor,
    scale: tl.tensor,
    shift: tl.tensor,
    raw: tl.tensor,  # [padded, width] or None: the result before norm and activation
    out: tl.tensor,  # [padded, width]
    padded: tl.tensor,  # how many rows there are, those of padding included
    width: tl.tensor,
    part_stride: tl.tensor,  # elements from a row of parts to the next
    to_gate: tl.tensor,  # elements from a value to its gate, for geglu
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLITS: tl.constexpr,
    SILU: tl.constexpr,
    GEGLU: tl.constexpr,
) -> None:
    real = real_rows(padded, count)
    if tl.program_id(0) * BM >= real:
        return
    m = tl.program_id(0) * BM + tl.arange(0, BM)  # [BM]
    n = tl.program_id(1) * BN + tl.arange(0, BN)  # [BN]
    size = padded.to(tl.int64) * width
    # Rows past the last read the sum of a real one, which is not stored. Filters past the last are masked instead: a
    # minimum would hide from the compiler that filters lie side by side, and it would load them one by one.
    part = parts + tl.minimum(m, real - 1).to(tl.int64)[:, None] * part_stride + n[None, :]
    valid = (n < width)[None, :]
    total = sum_of_parts(part, size, valid, SPLITS)
    gate = sum_of_parts(part + to_gate, size, valid, SPLITS) if GEGLU else total
    finish(
        total, gate, m, tl.program_id(1) * BN, m < real, width, bias, sample, sample_bias, residual, scale, shift, raw,
        out, SILU, GEGLU, HALVES=False,
    )  # fmt: skip
