"""Tile shapes of the attention kernel by size: estimates from the registers and the shared memory of a Hopper GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_LEAST_KEYS = 1024  # of a split: fewer are not worth joining

# Keys of a sample up to which a tile was the fastest of ten on an H100, heads of 64: a text's 77 tokens in steps of 32
# take 5.4 to 7.1 us where steps of 64 take 6.3 to 7.8; of 2 x 1369 rows (queries and keys, 5 heads) tiles of 64 x 128
# take 19 us and 128 x 64 take 23; of 2 x 2809 rows 64 and 60.
_FEW_KEYS, _SOME_KEYS, _MANY_KEYS = 128, 512, 2048


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

        own_keys = keys // samples
        if width <= 64 and own_keys <= _FEW_KEYS:
            block, step, warps, stages = 128, 32, 4, 4
        elif width <= 64 and not cached and own_keys <= _MANY_KEYS:
            block, step, warps, stages = (64, 64, 4, 3) if own_keys <= _SOME_KEYS else (64, 128, 4, 2)
        else:
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
