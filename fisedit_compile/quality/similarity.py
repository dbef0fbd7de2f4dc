"""How alike two pictures are inside a region, and whether one has a seam around it that the other has not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fisedit_compile.masks.grown import grown

#: What a mean square error of 0 counts as: half a level of 8 bits.
_LEAST_ERROR = (0.5 / 255) ** 2


def as_pixels(picture: Any) -> Tensor:
    """A PIL image as fp64 ``[3, H, W]`` in [0, 1]."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).double() / 255


def ssim_inside(first: Tensor, second: Tensor, region: Tensor) -> float:
    """Structural similarity of two pictures ``[3, H, W]``, the mean over the windows centred in a region ``[H, W]``."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, windows = structural_similarity_index_measure(
        first[None], second[None], sigma=1.5, data_range=1.0, return_full_image=True
    )
    return float(windows[0][:, region].mean())


def psnr_inside(first: Tensor, second: Tensor, region: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of the pixels in a region ``[H, W]``; at most 54, that of half a level."""
    error = float((first - second)[:, region].square().mean())
    return float(-10 * np.log10(max(error, _LEAST_ERROR)))


def seam_excess(picture: Tensor, reference: Tensor, region: Tensor, reach: int) -> float:
    """How much steeper a picture is across a border than a reference at the same place, in levels of 8 bits.

    The border of the region, and of the region grown by each number of pixels up to ``reach``, since the background
    begins somewhere there. Each border is the mean over all pairs of neighbours that it parts, and the result that of
    the border with the largest: 0 for equal pictures, and a little above 0 for any two that differ by chance.

    Args:
        picture, reference: ``[3, H, W]`` in [0, 1].
        region: bool ``[H, W]``.
        reach: pixels.
    """
    distance = torch.zeros(region.shape, dtype=torch.int64, device=region.device)  # from the region, at most reach + 1
    for _ in range(reach + 1):
        distance += ~region
        region = grown(region[None])[0]
    sums = torch.zeros(reach + 1, dtype=picture.dtype, device=picture.device)
    pairs = torch.zeros_like(sums)
    for dim in (-2, -1):
        across = (steps(picture, dim) - steps(reference, dim)) * 255
        parted = distance.diff(dim=dim) != 0  # by one border, the one as far away as the nearer of both
        nearer = torch.minimum(*(distance.narrow(dim, start, across.shape[dim]) for start in (0, 1)))[parted]
        sums.index_add_(0, nearer, across[parted])
        pairs.index_add_(0, nearer, torch.ones_like(across[parted]))
    met = pairs > 0
    return float((sums[met] / pairs[met]).max()) if met.any() else 0.0


def steps(picture: Tensor, dim: int) -> Tensor:
    """The absolute difference of neighbours along a dimension of ``[3, H, W]``, the mean over colours."""
    return picture.diff(dim=dim).abs().mean(0)
