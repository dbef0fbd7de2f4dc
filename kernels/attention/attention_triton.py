"""Ragged flash attention on the GPU: queries of several samples against their keys, or against all keys of a picture.

A program has a block of one sample's queries in one head, and walks over the sample's keys with a running softmax. Keys
are rows, or (``attention_cached``) the pixels of a base's map, some of them replaced by fresh rows. Each such key is
chosen by its address, so that the base's map is neither copied nor written. Where the queries are too few to fill the
GPU, several programs share the keys, and a second kernel joins their parts in a fixed order: a result has the same bits
in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    start, end, query, row, peak, total, result, k, v, base_k, base_v, row_of, key_begin, column, real,
    k_stride, v_stride, base_k_stride, base_v_stride, scale,
    BN: tl.constexpr, MASK_HEAD: tl.constexpr, MASK_KEYS: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to one block of keys, from ``start`` on; returns what the next block needs.

    Args:
        query: [BM, WIDTH].
        row: int32 [BN], of each key the row that replaces it, -1 for none; not read without a base.
        peak, total: fp32 [BM], the greatest score so far and the sum of ``exp2(score - peak)``.
        result: fp32 [BM, WIDTH], the sum of the values, weighted likewise.
        real: bool [WIDTH], which columns the head has.
    """
    n = start + tl.arange(0, BN)  # [BN]
    valid = n < end
    at = key_begin + n
    if base_k is not None:
        fresh = row >= 0
        k_at = tl.where(fresh, k + row.to(tl.int64) * k_stride, base_k + at * base_k_stride)
        v_at = tl.where(fresh, v + row.to(tl.int64) * v_stride, base_v + at * base_v_stride)
        row = tl.load(row_of + at + BN, mask=n + BN < end, other=-1)
        if ALIGNED:  # the choice of two pointers hides it from the compiler, whose loads would be narrow
            k_at = tl.multiple_of(k_at, [16])
            v_at = tl.multiple_of(v_at, [16])
    else:
        k_at = k + at * k_stride
        v_at = v + at * v_stride
    k_at = k_at[None, :] + column[:, None]  # [WIDTH, BN]
    v_at = v_at[:, None] + column[None, :]  # [BN, WIDTH]
    if MASK_KEYS:
        key = tl.load(k_at, mask=valid[None, :] & real[:, None], other=0.0)
        value = tl.load(v_at, mask=valid[:, None] & real[None, :], other=0.0)
    elif MASK_HEAD:
        key = tl.load(k_at, mask=real[:, None], other=0.0)
        value = tl.load(v_at, mask=real[None, :], other=0.0)
    else:
        key = tl.load(k_at)
        value = tl.load(v_at)
    score = tl.dot(query, key, input_precision=PRECISION)  # [BM, BN]
    if MASK_KEYS:
        score = tl.where(valid[None, :], score, float("-inf"))
    # At least one key of each block exists, so that the new peak is finite. The scale is positive, so that the greatest
    # scaled score is the greatest score, scaled; and scaling is part of the multiply-add before the exponential.
    new_peak = tl.maximum(peak, tl.max(score, axis=1) * scale)
    weight = tl.exp2(score * scale - new_peak[:, None])
    shrink = tl.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weight, axis=1)
    result = tl.dot(weight.to(value.dtype), value, result * shrink[:, None], input_precision=PRECISION)
    return row, new_peak, total, result


@triton.jit
def block_of_queries(offsets, samples, block, BM: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sample that a block of BM queries belongs to, and its first and last query; -1 for a block too many.

    Samples are few, and their ``offsets``, int32 [samples + 1], stay on the device.
    """
    sample = -1
    begin, end, before = 0, 0, 0
    for b in range(samples):
        first, last = tl.load(offsets + b), tl.load(offsets + b + 1)
        blocks = tl.cdiv(last - first, BM)
        found = (block >= before) & (block < before + blocks)
        sample = tl.where(found, b, sample)
        begin = tl.where(found, first + (block - before) * BM, begin)
        end = tl.where(found, last, end)
        before += blocks
    return sample, begin, end


@triton.jit(do_not_specialize=["padded", "samples", "pixels"])
def attention_kernel(
    q: tl.tensor,  # [M, heads, HD]
    k: tl.tensor,  # [Mk, heads, HD]
    v: tl.tensor,
    base_k: tl.tensor,  # [samples * pixels, heads, HD] or None: keys are the rows k alone
    base_v: tl.tensor,
    row_of: tl.tensor,  # int32 [samples * pixels]: the row that replaces a pixel, or -1; None without a base
    q_offsets: tl.tensor,  # int32 [samples + 1]
    k_offsets: tl.tensor,  # int32 [samples + 1]; None: each sample has ``pixels`` keys
    out: tl.tensor,  # [M, heads, HD]; with splits fp32 [splits, M, heads, HD], not yet divided by the sums
    peaks: tl.tensor,  # fp32 [splits, M, heads] or None: the greatest score, times log2(e)
    sums: tl.tensor,  # fp32 [splits, M, heads] or None: the sum of exp2(score - peak)
    padded: tl.tensor,  # M, the rows of q, those of padding included
    samples: tl.tensor,
    pixels: tl.tensor,
    q_stride: tl.tensor,  # elements from a row or pixel to the next
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    base_k_stride: tl.tensor,
    base_v_stride: tl.tensor,
    scale: tl.tensor,  # of the scores, times log2(e), as the exponential is one of base 2
    HD: tl.constexpr,
    WIDTH: tl.constexpr,  # HD, rounded up to a power of two
    BM: tl.constexpr,
    BN: tl.constexpr,
    LONG: tl.constexpr,  # samples have so many keys that blocks without a mask get a loop of their own
    ALIGNED: tl.constexpr,  # the vectors of a head start at multiples of 16 bytes
    PRECISION: tl.constexpr,
) -> None:
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sample, q_begin, q_end = block_of_queries(q_offsets, samples, block, BM)
    if sample < 0:
        return

    if k_offsets is None:
        key_begin = tl.cast(sample, tl.int64) * pixels
        keys = pixels
    else:
        first_key = tl.load(k_offsets + sample)
        key_begin = first_key.to(tl.int64)
        keys = tl.load(k_offsets + sample + 1) - first_key
    span = tl.cdiv(tl.cdiv(keys, BN), tl.num_programs(2)) * BN
    begin = split * span
    end = tl.minimum(begin + span, keys)

    m = q_begin + tl.arange(0, BM)  # [BM]
    d = tl.arange(0, WIDTH)
    real = d < HD
    inside = m < q_end
    column = head * HD + d
    q_at = q + m.to(tl.int64)[:, None] * q_stride + column[None, :]
    query = tl.load(q_at, mask=inside[:, None] & real[None, :], other=0.0)  # [BM, WIDTH]

    peak = tl.full((BM,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BM,), dtype=tl.float32)
    result = tl.zeros((BM, WIDTH), dtype=tl.float32)
    row = tl.full((BN,), -1, dtype=tl.int32)
    if base_k is not None:
        # Which rows replace a block of pixels is read a step ahead. Keys that wait for it in their own step would need
        # stages of the software pipeline for both.
        ahead = begin + tl.arange(0, BN)
        row = tl.load(row_of + key_begin + ahead, mask=ahead < end, other=-1)
    rest = begin
    if LONG:
        rest += (end - begin) // BN * BN
        for start in range(begin, rest, BN):
            row, peak, total, result = _attend(
                start, end, query, row, peak, total, result, k, v, base_k, base_v, row_of, key_begin, column, real,
                k_stride, v_stride, base_k_stride, base_v_stride, scale, BN, WIDTH != HD, False, ALIGNED, PRECISION,
            )  # fmt: skip
    for start in range(rest, end, BN):
        row, peak, total, result = _attend(
            start, end, query, row, peak, total, result, k, v, base_k, base_v, row_of, key_begin, column, real,
            k_stride, v_stride, base_k_stride, base_v_stride, scale, BN, WIDTH != HD, True, ALIGNED, PRECISION,
        )  # fmt: skip

    stored = inside[:, None] & real[None, :]
    row_at = m.to(tl.int64) * tl.num_programs(1) + head  # [BM]: of [M, heads]
    if peaks is not None:
        row_at += split.to(tl.int64) * padded * tl.num_programs(1)
        tl.store(peaks + row_at, peak, mask=inside)
        tl.store(sums + row_at, total, mask=inside)
    else:
        result /= tl.where(total == 0.0, 1.0, total)[:, None]  # queries of a sample without keys get zeros
    tl.store(out + row_at[:, None] * HD + d[None, :], result.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["count", "splits"])
def join_splits_kernel(
    parts: tl.tensor,  # fp32 [splits, count, HD]
    peaks: tl.tensor,  # fp32 [splits, count]
    sums: tl.tensor,
    out: tl.tensor,  # [count, HD], with count = M * heads
    count: tl.tensor,
    splits: tl.tensor,
    SPLITS: tl.constexpr,  # splits, rounded up to a power of two
    HD: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    valid = split < splits
    at = split.to(tl.int64) * count + row  # [SPLITS]
    peak = tl.load(peaks + at, mask=valid, other=float("-inf"))
    highest = tl.max(peak, axis=0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)  # no split has a key: every part weighs nothing
    factor = tl.exp2(peak - highest)
    total = tl.sum(factor * tl.load(sums + at, mask=valid, other=0.0), axis=0)
    part = tl.load(parts + at[:, None] * HD + d[None, :], mask=valid[:, None] & (d < HD)[None, :], other=0.0)
    result = tl.sum(part * factor[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * HD + d, result.to(out.dtype.element_ty), mask=d < HD)
