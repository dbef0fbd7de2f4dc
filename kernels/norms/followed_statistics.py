"""Statistics of a GroupNorm that follow an edit: the base's, changed as the edit changed the tiles that it covers.

Source of the updating formulae: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
sample variances", 1979.
"""

from __future__ import annotations

import torch


def followed_statistics_reference(
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
    """The scale and shift of a group norm, some of whose map is another than the base's.

    Rows that lie in no tile that is covered are taken to be the base's: they are those at the mask's rim. Where all
    moments are the base's, its scale and shift come out to the bit.

    Args:
        moments: [F, G, 2] of the covered tiles, see ``tile_moments``.
        tile_ids: int32 [F]: ``sample * T + tile`` of each; -1 for one that is none.
        tile_sizes: int32 [T], pixels of each tile.
        base: [B * T, G, 2], the moments of all tiles of the base.
        scale, shift: [B, C] of the base.
        weight, bias: [C] or None.
        eps: is added to the variance.

    Returns:
        [B, C] each, in the dtype of ``scale``.
    """
    batch, tiles, wide = len(scale), len(tile_sizes), scale.dtype
    sizes = tile_sizes.to(wide)
    means, variances = base.to(wide).view(batch, tiles, -1, 2).unbind(3)  # [B, T, G]
    pixels = sizes.sum()
    mean = (sizes[:, None] * means).sum(1) / pixels  # [B, G]
    variance = (sizes[:, None] * (variances + (means - mean[:, None]).square())).sum(1) / pixels
    there, ids = tile_ids >= 0, tile_ids.clamp_min(0).long()
    sample = ids // tiles
    weights = (sizes[ids % tiles] * there)[:, None]  # [F, 1]
    new_mean, new_variance = moments.to(wide).unbind(2)  # [F, G]
    old_mean, old_variance = base.to(wide)[ids].unbind(2)
    apart = (new_mean - mean[sample]).square() - (old_mean - mean[sample]).square()
    zeros = torch.zeros_like(mean)
    moved = zeros.index_add(0, sample, weights * (new_mean - old_mean))  # [B, G]
    spread = zeros.index_add(0, sample, weights * (new_variance - old_variance + apart))
    changed, moved, spread = (moved != 0) | (spread != 0), moved / pixels, spread / pixels
    factor = torch.rsqrt((variance + spread - moved.square()).clamp_min(0) + eps)
    width = scale.shape[1] // factor.shape[1]
    changed, factor, new = (each.repeat_interleave(width, 1) for each in (changed, factor, mean + moved))
    if weight is not None:
        factor = factor * weight
    offset = -new * factor if bias is None else bias - new * factor
    return torch.where(changed, factor, scale), torch.where(changed, offset, shift)
