"""Tile shapes of the attention kernel by size: estimates from the registers and the shared memory of a Hopper GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_LEAST_KEYS = 1024  # of a split: fewer are not worth joining


@dataclass(frozen=True)
class AttentionTile:
    """A program's queries and the keys of a step; ``splits`` programs share the keys of a block of queries."""

    queries: int
    keys: int
    warps: int
    stages: int
    splits: int = 1


def head_width(head_dim: int) -> int:
    """The head dim as the kernel computes it: a power of two, a matrix unit's 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def choose_attention_tile(
    queries: int,
    keys: int,
    samples: int,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    multiprocessors: int,
    *,
    cached: bool = False,
) -> AttentionTile:
    """A tile by size; ``queries`` and ``keys`` are those of all samples, ``cached`` is for ``attention_cached``."""
    width = head_width(head_dim)
    if dtype.itemsize == 4:  # without tensor cores (ieee) the operands of a product live in registers
        block, step, warps, stages = (32, 32, 4, 2) if width <= 64 else (16, 16, 8, 2)
    else:
        # The height that leaves the busiest multiprocessor the fewest queries; of two such the taller, which reads the
        # keys half as often.
        def busiest(height: int) -> int:
            return height * -(-_programs(queries, height, samples, heads) // multiprocessors)

        block = 64 if width > 128 or busiest(64) < busiest(128) else 128
        step, stages = (64, 3) if width <= 128 else (32, 2)
        warps = 4 if width <= 64 else 8
    programs = _programs(queries, block, samples, heads)
    # Two programs on a multiprocessor hide each other's softmax.
    splits = max(1, min(2 * multiprocessors // programs, keys // samples // _LEAST_KEYS, 16))
    if cached and splits == 1 and block == 128:
        # Keys that are chosen by address need registers for it. With 8 warps an H100 took 225 us instead of 249 for
        # 2 x 2800 queries of 5 heads, and 13 instead of 15 for 2 x 210 of 20; with splits it varied.
        warps = 8
    return AttentionTile(block, step, warps, stages, splits)


def _programs(queries: int, block: int, samples: int, heads: int) -> int:
    """A sample may end in a part of a block: at most one more for each but the last."""
    return (-(-queries // block) + samples - 1) * heads
