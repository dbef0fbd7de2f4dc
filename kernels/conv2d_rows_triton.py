"""The convolution over rows as one implicit GEMM on the GPU: columns are gathered tile by tile, never stored.

A program computes a tile [rows, filters] of the output in a loop over the taps and their channels: it reads the tap's
entries of the neighbour table, the rows that they name, and the weights. Where the output has too few tiles to fill the
GPU, several programs split the loop of a tile, and a second kernel adds their partial sums in a fixed order: the result
is the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.conv2d_rows_tiles import Tile, choose_tile
from fisedit_compile.kernels.triton_launch import aligned, check_dtypes, input_precision, launch_on, multiprocessors

# Tiles of rows that run one after the other over all filters: together they read a few MB, which stay in L2.
_GROUP = 8


@triton.jit(do_not_specialize=["count", "active", "span"])
def _conv2d_rows_kernel(
    rows: tl.tensor,  # [active, channels]
    halo: tl.tensor,  # [Hh, channels] or None
    weight: tl.tensor,  # [filters, TAPS * channels]
    bias: tl.tensor,  # [filters] or None
    table: tl.tensor,  # int32 [count, TAPS]
    out: tl.tensor,  # [count, filters]; of splits fp32 [splits, count, filters]
    count: tl.tensor,
    active: tl.tensor,
    channels: tl.tensor,
    filters: tl.tensor,
    span: tl.tensor,  # steps of the loop that a split takes
    TAPS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,  # BK divides channels
    ALIGNED: tl.constexpr,  # every row and halo row starts at a multiple of 16 bytes
    SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    row_tiles = tl.cdiv(count, BM)
    filter_tiles = tl.cdiv(filters, BN)
    tile = tl.program_id(0)
    group = tile // (GROUP * filter_tiles)
    height = tl.minimum(row_tiles - group * GROUP, GROUP)
    within = tile - group * GROUP * filter_tiles
    m = (group * GROUP + within % height) * BM + tl.arange(0, BM)  # [BM]
    n = (within // height) * BN + tl.arange(0, BN)  # [BN]
    inside = m < count

    step = tl.arange(0, BK)
    entries = table + m.to(tl.int64) * TAPS  # [BM]
    # Filters past the last read real weights, whose products are never stored: no mask in the loop.
    weights = weight + (n % filters).to(tl.int64)[None, :] * (TAPS * channels) + step[:, None]  # [BK, BN]
    chunks = tl.cdiv(channels, BK)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, TAPS * chunks)
    # Entries are read a step ahead: a load of rows that waits for its entries in its own step would need stages of the
    # software pipeline for both, and half as many rows would be in flight.
    entry = tl.load(entries + tl.minimum(begin // chunks, TAPS - 1), mask=inside, other=-1)  # [BM]
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for i in range(begin, end):
        tap = i // chunks
        first = (i - tap * chunks) * BK
        source = rows + entry.to(tl.int64) * channels
        if halo is not None:
            source = tl.where(entry < active, source, halo + (entry - active).to(tl.int64) * channels)
            if ALIGNED:  # a choice of two pointers hides it, and unaligned loads are two bytes wide and not pipelined
                source = tl.multiple_of(source, [16])
        present = (entry >= 0)[:, None]
        if WHOLE:
            a = tl.load(source[:, None] + (first + step)[None, :], mask=present, other=0.0)  # [BM, BK]
            b = tl.load(weights + (tap * channels + first))  # [BK, BN]
        else:
            valid = first + step < channels
            a = tl.load(source[:, None] + (first + step)[None, :], mask=present & valid[None, :], other=0.0)
            b = tl.load(weights + (tap * channels + first), mask=valid[:, None], other=0.0)
        entry = tl.load(entries + tl.minimum((i + 1) // chunks, TAPS - 1), mask=inside, other=-1)
        total = tl.dot(a, b, total, input_precision=PRECISION)

    stored = inside[:, None] & (n < filters)[None, :]
    at = m.to(tl.int64)[:, None] * filters + n[None, :]
    if SPLIT:
        at += tl.program_id(1).to(tl.int64) * count * filters
        tl.store(out + at, total, mask=stored)
    else:
        if bias is not None:
            total += tl.load(bias + n, mask=n < filters, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["count", "splits"])
def _add_splits_kernel(
    parts: tl.tensor,  # fp32 [splits, count, filters]
    bias: tl.tensor,  # [filters] or None
    out: tl.tensor,  # [count, filters]
    count: tl.tensor,
    filters: tl.tensor,
    splits: tl.tensor,
    SPLITS: tl.constexpr,  # splits, rounded up to a power of two: all loads are in flight together
    BN: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    split = tl.arange(0, SPLITS)
    at = (split.to(tl.int64) * count + row)[:, None] * filters + n[None, :]  # [SPLITS, BN]
    values = tl.load(parts + at, mask=(split < splits)[:, None] & (n < filters)[None, :], other=0.0)
    total = tl.sum(values, axis=0)
    if bias is not None:
        total += tl.load(bias + n, mask=n < filters, other=0.0).to(tl.float32)
    tl.store(out + row * filters + n, total.to(out.dtype.element_ty), mask=n < filters)


def conv2d_rows_triton(
    rows: torch.Tensor,
    halo: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    table: torch.Tensor,
    tile: Tile | None = None,
) -> torch.Tensor:
    """Convolve at the rows of ``table``; arguments as of the reference in ``conv2d_rows``, on one GPU.

    ``tile`` None takes the one that the size heuristic picks. Entries of the table are not checked.

    Returns:
        [M, Cout], contiguous.

    Raises:
        ValueError: dtypes that differ or that the kernel does not take, or channels that do not fit.
    """
    check_dtypes("conv2d_rows", rows, halo, weight, bias)
    (active, channels), (count, taps), filters = rows.shape, table.shape, weight.shape[0]
    if weight.shape[1] != taps * channels or (halo is not None and halo.shape[1] != channels):
        raise ValueError(
            f"conv2d_rows: weight [{filters}, {weight.shape[1]}] does not fit rows of {channels} channels and a table "
            f"of {taps} taps; give [Cout, {taps * channels}], and a halo with the channels of the rows"
        )
    out = rows.new_empty(count, filters)
    if out.numel() == 0:
        return out
    rows, weight, table = rows.contiguous(), weight.contiguous(), table.contiguous()
    halo = halo.contiguous() if halo is not None and halo.numel() else None
    tile = tile or choose_tile(count, taps, channels, filters, rows.dtype, multiprocessors(rows.device))
    steps = taps * triton.cdiv(channels, tile.channels)
    split = tile.splits > 1
    target = rows.new_empty(tile.splits, count, filters, dtype=torch.float32) if split else out
    tiles = triton.cdiv(count, tile.rows) * triton.cdiv(filters, tile.filters)
    with launch_on(rows):
        _conv2d_rows_kernel[(tiles, tile.splits)](
            rows,
            halo,
            weight,
            bias,
            table,
            target,
            count,
            active,
            channels,
            filters,
            triton.cdiv(steps, tile.splits),
            TAPS=taps,
            BM=tile.rows,
            BN=tile.filters,
            BK=tile.channels,
            GROUP=_GROUP,
            WHOLE=channels % tile.channels == 0,
            ALIGNED=aligned(channels, rows, halo),
            SPLIT=split,
            PRECISION=input_precision(rows.dtype),
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
        if split:
            padded = triton.next_power_of_2(tile.splits)
            width = min(triton.next_power_of_2(filters), max(64, 4096 // padded))
            _add_splits_kernel[(count, triton.cdiv(filters, width))](
                target, bias, out, count, filters, tile.splits, SPLITS=padded, BN=width, num_warps=4
            )
    return out
