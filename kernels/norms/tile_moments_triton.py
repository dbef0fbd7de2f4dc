"""Moments over tiles on the GPU, as ``kernels/ops.py`` calls them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.launch.triton_launch import check_dtypes, launch
from fisedit_compile.kernels.norms.tile_moments import moments_dtype


@triton.jit
def _tile_moments_kernel(
    rows: tl.tensor,  # [M, channels]
    tiles: tl.tensor,  # int32 [F, most]
    moments: tl.tensor,  # [F, groups, 2]
    channels: tl.tensor,
    most: tl.tensor,
    WIDTH: tl.constexpr,  # channels of a group
    BP: tl.constexpr,  # most, rounded up to a power of two
    BC: tl.constexpr,  # WIDTH, rounded up to a power of two
) -> None:
    tile, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p, c = tl.arange(0, BP), tl.arange(0, BC)
    row = tl.load(tiles + tile * most + p, mask=p < most, other=-1)
    there = row >= 0
    inside = there[:, None] & (c < WIDTH)[None, :]  # [BP, BC]
    at = row.to(tl.int64)[:, None] * channels + (group * WIDTH + c)[None, :]
    x = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
    count = tl.maximum(tl.sum(there.to(tl.int32), axis=0), 1) * WIDTH
    mean = tl.sum(tl.sum(x, axis=1), axis=0) / count
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=1), axis=0) / count
    to = moments + (tile * tl.num_programs(1) + group) * 2
    tl.store(to, mean)
    tl.store(to + 1, variance)


def tile_moments_triton(rows: torch.Tensor, tiles: torch.Tensor, groups: int) -> torch.Tensor:
    """``tile_moments`` on one GPU; its reference describes the arguments.

    Raises:
        ValueError: the kernel does not take the dtype, or the groups do not divide the channels.
    """
    check_dtypes("tile_moments", rows)
    channels, (count, most) = rows.shape[1], tiles.shape
    if channels % groups:
        raise ValueError(f"tile_moments: {groups} groups of {channels} channels; give groups of as many channels each")
    rows, width = rows.contiguous(), channels // groups
    moments = rows.new_empty(count, groups, 2, dtype=moments_dtype(rows.dtype))
    if count:
        blocks = {"BP": triton.next_power_of_2(most), "BC": triton.next_power_of_2(width)}
        launch(_tile_moments_kernel, (count, groups), rows)(
            rows, tiles.contiguous(), moments, channels, most, WIDTH=width, **blocks, num_warps=1
        )
    return moments
