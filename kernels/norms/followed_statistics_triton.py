"""Statistics that follow an edit on the GPU, as ``kernels/ops.py`` calls them: one program a sample and group."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.launch.triton_launch import check_dtypes, launch

#: Covered tiles that a program reads at a time.
_COVERED = 128


@triton.jit
def _followed_statistics_kernel(
    moments: tl.tensor,  # [covered, groups, 2]
    tile_ids: tl.tensor,  # int32 [covered]
    tile_sizes: tl.tensor,  # int32 [tiles]
    base: tl.tensor,  # [batch * tiles, groups, 2]
    scale: tl.tensor,  # fp32 [batch, channels]
    shift: tl.tensor,
    weight: tl.tensor,  # [channels] or None
    bias: tl.tensor,  # [channels] or None
    new_scale: tl.tensor,  # fp32 [batch, channels]
    new_shift: tl.tensor,
    covered: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    tiles: tl.tensor,
    WIDTH: tl.constexpr,  # channels of a group
    BT: tl.constexpr,  # tiles, rounded up to a power of two
    BF: tl.constexpr,  # covered tiles at a time
    BC: tl.constexpr,  # WIDTH, rounded up to a power of two
) -> None:
    sample, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    t = tl.arange(0, BT)
    size = tl.load(tile_sizes + t, mask=t < tiles, other=0).to(tl.float32)
    at = ((sample * tiles + t) * groups + group) * 2
    m = tl.load(base + at, mask=t < tiles, other=0.0).to(tl.float32)
    v = tl.load(base + at + 1, mask=t < tiles, other=0.0).to(tl.float32)
    pixels = tl.sum(size, axis=0)
    mean = tl.sum(size * m, axis=0) / pixels
    variance = tl.sum(size * (v + (m - mean) * (m - mean)), axis=0) / pixels
    moved = 0.0
    spread = 0.0
    for start in range(0, covered, BF):
        f = start + tl.arange(0, BF)
        tile = tl.load(tile_ids + f, mask=f < covered, other=-1)
        mine = (tile >= 0) & (tile // tiles == sample)
        tile = tl.where(mine, tile, 0)
        weights = tl.load(tile_sizes + tile % tiles, mask=mine, other=0).to(tl.float32)
        of_edit, of_base = (f * groups + group) * 2, (tile * groups + group) * 2
        new_m = tl.load(moments + of_edit, mask=mine, other=0.0).to(tl.float32)
        new_v = tl.load(moments + of_edit + 1, mask=mine, other=0.0).to(tl.float32)
        old_m = tl.load(base + of_base, mask=mine, other=0.0).to(tl.float32)
        old_v = tl.load(base + of_base + 1, mask=mine, other=0.0).to(tl.float32)
        apart = (new_m - mean) * (new_m - mean) - (old_m - mean) * (old_m - mean)
        moved += tl.sum(weights * (new_m - old_m), axis=0)
        spread += tl.sum(weights * (new_v - old_v + apart), axis=0)
    moved_by = moved / pixels
    spread_by = spread / pixels - moved_by * moved_by
    c = tl.arange(0, BC)
    column = group * WIDTH + c
    inside = c < WIDTH
    at = sample.to(tl.int64) * channels + column
    factor = tl.zeros((BC,), dtype=tl.float32) + tl.rsqrt(tl.maximum(variance + spread_by, 0.0) + eps)
    if weight is not None:
        factor *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    offset = -(mean + moved_by) * factor
    if bias is not None:
        offset += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    changed = (moved != 0.0) | (spread != 0.0)
    tl.store(new_scale + at, tl.where(changed, factor, tl.load(scale + at, mask=inside, other=0.0)), mask=inside)
    tl.store(new_shift + at, tl.where(changed, offset, tl.load(shift + at, mask=inside, other=0.0)), mask=inside)


def followed_statistics_triton(
    moments: torch.Tensor,
    tile_ids: torch.Tensor,
    tile_sizes: torch.Tensor,
    base: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``followed_statistics`` on one GPU; its reference describes the arguments.

    Raises:
        ValueError: the kernel does not take the dtype.
    """
    check_dtypes("followed_statistics", moments)
    (batch, channels), groups, tiles = scale.shape, moments.shape[1], len(tile_sizes)
    width = channels // groups
    new_scale, new_shift = scale.new_empty(2, batch, channels)
    launch(_followed_statistics_kernel, (batch, groups), moments)(
        moments,
        tile_ids,
        tile_sizes,
        base.contiguous(),
        scale.contiguous(),
        shift.contiguous(),
        weight,
        bias,
        new_scale,
        new_shift,
        len(tile_ids),
        channels,
        eps,
        tiles,
        WIDTH=width,
        BT=triton.next_power_of_2(tiles),
        BF=_COVERED,
        BC=triton.next_power_of_2(width),
        num_warps=4,
    )
    return new_scale, new_shift
