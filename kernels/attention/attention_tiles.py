"""Tile shapes of the attention kernel by size, chosen for the registers and the shared memory of a Hopper GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_LEAST_KEYS_OF_A_SPLIT = 1024  # fewer save less time than joining the splits takes

# Keys of a sample up to which each of three tiles is used, the fastest of ten on an H100 with heads of 64. For the 77
# tokens of a text, steps of 32 keys take 5.4 to 7.1 us where steps of 64 take 6.3 to 7.8. For 2 x 1369 rows (queries
# and keys, 5 heads) tiles of 64 queries x 128 keys take 19 us and 128 x 64 take 23; for 2 x 2809 rows it is 64 and 60
# us.
_TEXT_KEYS, _FEW_KEYS, _MEDIUM_KEYS = 128, 512, 2048


@dataclass(frozen=True)
class AttentionTile:
    """What one program of the kernel computes, and how it runs.

    Attributes:
        queries: in the block of a program.
        keys: that a step of its loop attends to.
        warps: of a program.
        stages: of its software pipeline: steps whose keys and values are in flight at once.
        splits: how many programs share the keys of a block of queries.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    splits: int = 1


def head_width(head_dim: int) -> int:
    """The width in which the kernel computes a head: the next power of two, and at least a matrix unit's 16."""
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
    """A tile by size.

    Args:
        queries, keys: of all samples together, padding included.
        samples, heads, head_dim: of the attention.
        dtype: of queries, keys and values.
        multiprocessors: of the GPU.
        cached: each key is chosen by address, of the base or of a fresh row, see ``attention_cached``.
    """
    width = head_width(head_dim)
    if dtype.itemsize == 4:  # a product in full fp32 uses no tensor cores, and its operands live in registers
        block, step, warps, stages = (32, 32, 4, 2) if width <= 64 else (16, 16, 8, 2)
    else:
        # Blocks of 64 or 128 queries, whichever leaves the busiest multiprocessor fewer queries. If both leave as many,
        # the taller block is better: it reads the keys half as often.
        def busiest(height: int) -> int:
            """Queries of the multiprocessor that computes the most of them."""
            return height * -(-_programs(queries, height, samples, heads) // multiprocessors)

        own_keys = keys // samples
        if width <= 64 and own_keys <= _TEXT_KEYS:
            block, step, warps, stages = 128, 32, 4, 4
        elif width <= 64 and not cached and own_keys <= _MEDIUM_KEYS:
            block, step, warps, stages = (64, 64, 4, 3) if own_keys <= _FEW_KEYS else (64, 128, 4, 2)
        else:
            block = 64 if width > 128 or busiest(64) < busiest(128) else 128
            step, stages = (64, 3) if width <= 128 else (32, 2)
            warps = 4 if width <= 64 else 8
    programs = _programs(queries, block, samples, heads)
    # Enough splits for two programs on each multiprocessor: one computes its products while the other does its softmax.
    splits = max(1, min(2 * multiprocessors // programs, keys // samples // _LEAST_KEYS_OF_A_SPLIT, 16))
    if cached and splits == 1 and block == 128:
        # Choosing keys by address takes registers, of which more warps have more. With 8 warps an H100 takes 225 us
        # instead of 249 for 2 x 2800 queries of 5 heads, and 13 instead of 15 for 2 x 210 of 20. With splits there was
        # no clear winner.
        warps = 8
    return AttentionTile(block, step, warps, stages, splits)


def _programs(queries: int, block: int, samples: int, heads: int) -> int:
    """Programs of an attention without splits: each sample but the last may add a block that is not full."""
    return (-(-queries // block) + samples - 1) * heads
