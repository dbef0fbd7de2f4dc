"""Where a product of rows reads from: the rows that a neighbour table names, a shortcut's beside them, and the filters.

Rows run down the matrix unit's product and filters across it, or with ACROSS the reverse; see ``Tile``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(rows, table, m, inside, real, row_stride, begin, TAPS: tl.constexpr, ALIGNED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where the table has the entries of rows m [BM], and those of the first tap; without a table where they lie."""
    if table is not None:
        at = table + m.to(tl.int64) * TAPS
        entry = tl.load(at + begin % TAPS, mask=inside, other=-1)
    else:
        # Rows past the last read a real one, as filters do.
        at = rows + tl.minimum(m, real - 1).to(tl.int64) * row_stride
        entry = m
        if ALIGNED:
            at = tl.multiple_of(at, [16])
    return at, entry


@triton.jit
def row_values(  # type: ignore[no-untyped-def]
    rows, halo, beside, at, entry, m, inside, aside, active, row_stride, channels, side_channels, first, last, step,
    TABLE: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Channels ``first + step`` [BK] of the rows that entries [BM] name: [BM, BK], across [BK, BM].

    Without a table, of the rows at ``at``; ``aside``, of the rows m of ``beside``.
    """
    channel = first + step
    if TABLE:
        source = rows + entry.to(tl.int64) * row_stride
        present = entry >= 0
        if halo is not None:
            source = tl.where(entry < active, source, halo + (entry - active).to(tl.int64) * channels)
        if beside is not None:
            source = tl.where(aside, beside + m.to(tl.int64) * side_channels, source)
            present = tl.where(aside, inside, present)
        if ALIGNED:  # a choice of two pointers hides it, and unaligned loads are narrow and not pipelined
            source = tl.multiple_of(source, [16])
        present = down(present, ACROSS)
        if not WHOLE:
            present = present & along(channel < last, ACROSS)
        values = tl.load(down(source, ACROSS) + along(channel, ACROSS), mask=present, other=0.0)
    else:
        values = _load(down(at, ACROSS) + along(channel, ACROSS), along(channel < last, ACROSS), WHOLE)
    return values


@triton.jit
def filter_values(  # type: ignore[no-untyped-def]
    weight, side_weight, n, aside, tap, channels, side_channels, first, last, step,
    TAPS: tl.constexpr, ALIGNED: tl.constexpr, WHOLE: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """Channels ``first + step`` [BK] of a tap, or ``aside``, in filters n [BN]: [BK, BN], across [BN, BK]."""
    channel = first + step
    start, stride, depth = weight, TAPS * channels, tap * channels + channel
    if side_weight is not None:
        start = tl.where(aside, side_weight, weight)
        stride = tl.where(aside, side_channels, stride)
        depth = tl.where(aside, 0, tap * channels) + channel
    at = start + n * stride  # [BN]
    if side_weight is not None:  # noqa: SIM102 - Triton compiles no branch that a constant rules out
        if ALIGNED:  # a choice of two pointers hides it
            at = tl.multiple_of(at, [16])
    return _load(along(at, ACROSS) + down(depth, ACROSS), down(channel < last, ACROSS), WHOLE)


@triton.jit
def _load(at, within, WHOLE: tl.constexpr):  # type: ignore[no-untyped-def]
    """What lies there, and zeros where a step goes past the last channel."""
    if WHOLE:  # noqa: SIM108 - Triton compiles one branch alone
        values = tl.load(at)
    else:
        values = tl.load(at, mask=within, other=0.0)
    return values


@triton.jit
def down(vector, ACROSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[M] as [M, 1], across [1, M]."""
    return vector[None, :] if ACROSS else vector[:, None]


@triton.jit
def along(vector, ACROSS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[N] as [1, N], across [N, 1]."""
    return vector[:, None] if ACROSS else vector[None, :]
