"""The operands that a step of a product of rows reads: the rows that the neighbour table names, and the filters.

Rows run down the matrix unit's product and filters across it; with ACROSS it is the other way round, see ``Tile``. So a
shape is given twice here: "[BM, BK], across [BK, BM]" is [BM, BK] without ACROSS and [BK, BM] with it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(rows, table, m, row_stride, begin, TAPS: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Addresses and first entries of rows m [BM], each [BM].

    With a table, the address of each row's entries in it, and the entry of the tap that the loop begins with. Without
    one, the address of each row itself.
    """
    if table is not None:
        at = table + m.to(tl.int64) * TAPS
        entry = tl.load(at + begin % TAPS)
    else:
        at = rows + m.to(tl.int64) * row_stride
        entry = m
        if ALIGNED:
            at = tl.multiple_of(at, [16])
    return at, entry


@triton.jit
def row_values(  # type: ignore[no-untyped-def]
    rows, halo, shortcut, zeros, at, entry, m, in_shortcut, active, row_stride, channels, shortcut_channels, first,
    last, step, TABLE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Channels ``first + step`` [BK] of the rows that a step reads: [BM, BK], across [BK, BM].

    These are the rows that the entries [BM] name, without a table those at the addresses ``at`` [BM], and in a step of
    the shortcut (``in_shortcut``) the rows m [BM] of ``shortcut``. Channels from ``last`` on are zero.
    """
    channel = first + step
    if TABLE:
        at = rows + entry.to(tl.int64) * row_stride
        if halo is not None:
            at = tl.where(entry < active, at, halo + (entry - active).to(tl.int64) * channels)
        # Absent neighbours read a row of zeros. A mask instead would go from the thread that has the entry to those
        # that copy its row, through shared memory and behind a barrier, in every step of the loop.
        at = tl.where(entry >= 0, at, zeros)
        if shortcut is not None:
            at = tl.where(in_shortcut, shortcut + m.to(tl.int64) * shortcut_channels, at)
        # The choice between pointers hides their alignment from the compiler, whose loads would be narrow then and not
        # pipelined.
        if ALIGNED:
            at = tl.multiple_of(at, [16])
    return _load(down(at, ACROSS) + along(channel, ACROSS), along(channel < last, ACROSS), WHOLE)


@triton.jit
def filter_values(  # type: ignore[no-untyped-def]
    weight, shortcut_weight, n, in_shortcut, tap, channels, shortcut_channels, first, last, step,
    TAPS: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Channels ``first + step`` [BK] of one tap in the filters n [BN]: [BK, BN], across [BN, BK].

    In a step of the shortcut (``in_shortcut``) they are those of ``shortcut_weight``. From ``last`` on they are zero.
    """
    channel = first + step
    # Offsets in 32 bits, for which the launcher holds weights to 2^31 values.
    start, stride, depth = weight, TAPS * channels, tap * channels + channel
    if shortcut_weight is not None:
        start = tl.where(in_shortcut, shortcut_weight, weight)
        stride = tl.where(in_shortcut, shortcut_channels, stride)
        depth = tl.where(in_shortcut, 0, tap * channels) + channel
    at = start + n * stride  # [BN]
    if shortcut_weight is not None:  # noqa: SIM102 - Triton compiles no branch that a constant rules out
        if ALIGNED:  # the choice between two pointers hides it from the compiler
            at = tl.multiple_of(at, [16])
    return _load(along(at, ACROSS) + down(depth, ACROSS), down(channel < last, ACROSS), WHOLE)


@triton.jit
def _load(at, within, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The values at the addresses ``at``, and zeros where a step goes past the last channel."""
    if WHOLE:  # noqa: SIM108 - Triton compiles one branch alone
        values = tl.load(at)
    else:
        values = tl.load(at, mask=within, other=0.0)
    return values


@triton.jit
def down(vector, ACROSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector of rows or of a filter's channels [M] along the first axis of an operand: [M, 1], across [1, M]."""
    return vector[None, :] if ACROSS else vector[:, None]


@triton.jit
def along(vector, ACROSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A vector [N] along the second axis of an operand: [1, N], across [N, 1]."""
    return vector[:, None] if ACROSS else vector[None, :]
