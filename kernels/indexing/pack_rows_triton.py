"""Rows to few bits a value on the GPU, as ``kernels/ops.py`` calls it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.indexing.row_format import RowFormat
from fisedit_compile.kernels.launch.triton_launch import POINTWISE_VALUES, check_dtypes, launch


@triton.jit
def _pack_rows_kernel(
    rows: tl.tensor,  # [count, width], rows `stride` apart
    ends: tl.tensor,  # [count, words of a row]: the packed rows in the dtype of the values
    codes: tl.tensor,  # uint8 [count, bytes of a row]: the same memory
    count: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    HEADER: tl.constexpr,  # bytes of a row ahead of its codes
    NBYTES: tl.constexpr,  # of a row
    BITS: tl.constexpr,
    BR: tl.constexpr,
    BG: tl.constexpr,  # at least GROUP, a power of 2
) -> None:
    each: tl.constexpr = 8 // BITS
    group = tl.program_id(1)
    row = (tl.program_id(0) * BR + tl.arange(0, BR)).to(tl.int64)  # [BR]
    at = tl.arange(0, BG)  # [BG]
    channel = group * GROUP + at
    inside = (row < count)[:, None] & ((at < GROUP) & (channel < WIDTH))[None, :]
    values = tl.load(rows + row[:, None] * stride + channel[None, :], mask=inside, other=0.0)
    x = values.to(tl.float32)  # [BR, BG]
    number = inside & (x == x)
    low = tl.min(tl.where(number, x, float("inf")), 1)  # [BR]
    high = tl.max(tl.where(number, x, float("-inf")), 1)
    unknown = tl.max((inside & (x != x)).to(tl.int32), 1) > 0
    low = tl.where(unknown, float("nan"), low)
    step = ((high - low) / (2**BITS - 1)).to(values.dtype)
    spread = step.to(tl.float32)
    code = tl.floor((x - low[:, None]) / tl.where(spread == 0, 1.0, spread)[:, None] + 0.5)
    code = tl.where(code == code, tl.minimum(tl.maximum(code, 0.0), 2**BITS - 1), 0.0)
    code = tl.where(inside, code, 0.0).to(tl.int32)
    shifted = code << ((at % each) * BITS)[None, :]
    byte = tl.sum(tl.reshape(shifted, [BR, BG // each, each]), 2)  # [BR, BG / each]
    real = row < count
    words: tl.constexpr = NBYTES * 8 // values.dtype.primitive_bitwidth
    tl.store(ends + row * words + 2 * group, low.to(values.dtype), mask=real)
    tl.store(ends + row * words + 2 * group + 1, step, mask=real)
    place = tl.arange(0, BG // each)  # [BG / each]
    written = ((place < GROUP // each) & (group * GROUP + place * each < WIDTH))[None, :] & real[:, None]
    target = codes + row[:, None] * NBYTES + HEADER + group * (GROUP // each) + place[None, :]
    tl.store(target, byte.to(tl.uint8), mask=written)


def pack_rows_triton(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """``pack_rows`` on one GPU; its reference describes the arguments and the result.

    Raises:
        ValueError: a dtype that kernels do not take.
    """
    check_dtypes("pack_rows", rows)
    form = RowFormat(tuple(rows.shape[1:]), rows.dtype, bits)
    flat = rows.flatten(1)  # of a slice of a wider product a view
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    # The kernel writes all bytes that say something; those behind them have to be 0.
    make = rows.new_empty if form.used == form.nbytes else rows.new_zeros
    packed = make(rows.shape[0], form.nbytes, dtype=torch.uint8)
    width = triton.next_power_of_2(form.group)
    height = max(1, POINTWISE_VALUES // width)
    if packed.numel():
        launch(_pack_rows_kernel, (triton.cdiv(rows.shape[0], height), form.groups), rows)(
            flat,
            packed.view(rows.dtype),
            packed,
            rows.shape[0],
            flat.stride(0),
            WIDTH=form.width,
            GROUP=form.group,
            HEADER=form.header,
            NBYTES=form.nbytes,
            BITS=bits,
            BR=height,
            BG=width,
            num_warps=4,
        )
    return packed
