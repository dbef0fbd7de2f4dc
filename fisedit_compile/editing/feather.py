"""How much of an edit each pixel of its picture takes: all around the mask, none far away, evenly less between.

The mask grown by one more pixel at a time says it; here each pixel is looked at once for each row of cells near it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def feather_levels(mask: Tensor, cell: tuple[int, int], grown: int, feathered: int) -> Tensor:
    """Whole numbers from 0 to ``feathered``: ``feathered + grown`` less the distance from the mask, within these ends.

    Distances are those of squares that grow: the larger one of both directions; pixels of the mask have 0.

    Args:
        mask: bool ``[n, h, w]``, on the host.
        cell: height and width in pixels of one cell of the mask.
        grown: up to this distance, in pixels, the level is ``feathered``.
        feathered: over as many pixels more it falls to 0; at least 1.

    Returns:
        ``[n, H, W]``, uint8 where that holds ``feathered``, else int32.
    """
    n, h, w = mask.shape
    height, width = cell
    dtype = torch.uint8 if feathered < 256 else torch.int32
    across = torch.zeros(n, h, w, width, dtype=dtype)
    for shifted, levels in _shifts(mask.to(dtype), 2, _profiles(width, grown, feathered, dtype)):
        torch.maximum(across, shifted[..., None] * levels, out=across)
    across = across.view(n, h, w * width)  # by the cells of its own row alone
    out = torch.zeros(n, h, height, w * width, dtype=dtype)
    for shifted, levels in _shifts(across, 1, _profiles(height, grown, feathered, dtype)):
        torch.maximum(out, torch.minimum(shifted[:, :, None], levels[:, None]), out=out)
    return out.view(n, h * height, w * width)


def cells_reached(pixels: int, grown: int, feathered: int) -> int:
    """Over how many cells of ``pixels`` each the levels beside a cell of the mask are above 0."""
    return max(0, -(-(grown + feathered - 1) // pixels))


def _profiles(pixels: int, grown: int, feathered: int, dtype: torch.dtype) -> list[Tensor]:
    """The level of each pixel of a cell, by the place of the only active cell, from the farthest before it to after."""
    reach, inside = cells_reached(pixels, grown, feathered), torch.arange(pixels)
    distances = [inside + 1 + pixels * (away - 1) for away in range(reach, 0, -1)]
    distances = [*distances, torch.zeros_like(inside), *(each.flip(0) for each in reversed(distances))]
    return [(feathered + grown - each).clamp(0, feathered).to(dtype) for each in distances]


def _shifts(values: Tensor, dim: int, profiles: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The values of the cells at each place along ``dim``, 0 outside, beside the profile for that place."""
    reach, length = len(profiles) // 2, values.shape[dim]
    padded = F.pad(values, (0, 0) * (values.ndim - 1 - dim) + (reach, reach))
    return [(padded.narrow(dim, place, length), profile) for place, profile in enumerate(profiles)]
