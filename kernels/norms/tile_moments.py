"""Mean and variance of the groups of a group norm over tiles of a map."""

from __future__ import annotations

import torch


def moments_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which moments of values of ``dtype`` are kept: those of half precision may be beyond the range of fp16."""
    return torch.bfloat16 if dtype.itemsize == 2 else dtype


def tile_moments_reference(rows: torch.Tensor, tiles: torch.Tensor, groups: int) -> torch.Tensor:
    """The moments of each tile and group, of which a tile's come out the same whatever tiles are beside it.

    Args:
        rows: [M, C].
        tiles: int32 [F, P], the rows of each tile, padded with -1.
        groups: into how many groups of neighbouring channels C divides.

    Returns:
        [F, groups, 2]: mean and variance, rounded to :func:`moments_dtype`; zero for a tile without rows.

    Raises:
        RuntimeError: the groups do not divide the channels.
    """
    return moments_of_tiles(rows, tiles, groups, padded=not bool((tiles >= 0).all()))


def moments_of_tiles(rows: torch.Tensor, tiles: torch.Tensor, groups: int, *, padded: bool) -> torch.Tensor:
    """:func:`tile_moments_reference` for a graph, which does not look whether tiles are padded but is told so."""
    wide = rows[tiles.clamp_min(0).long()].to(torch.promote_types(rows.dtype, torch.float32))  # [F, P, C]
    values = wide.unflatten(2, (groups, -1)).transpose(1, 2)  # [F, G, P, C / G]
    inside = (tiles >= 0)[:, None, :, None]  # [F, 1, P, 1]
    count = inside.sum((2, 3)).clamp_min(1) * values.shape[3]
    mean = _sum(values.where(inside, 0) if padded else values) / count
    squares = (values - mean[:, :, None, None]).square()
    variance = _sum(squares.where(inside, 0) if padded else squares) / count
    return torch.stack([mean, variance], 2).to(moments_dtype(rows.dtype))


def _sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of the last two dimensions, each in the same order however many there are."""
    return values.flatten(2).contiguous().sum(2)
