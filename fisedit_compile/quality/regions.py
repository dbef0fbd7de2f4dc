"""Which cells an edit really changes, and how well a mask covers them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

#: A cell has changed where the difference of the final latents, as a root mean square over channels, is more than this
#: share of the base's standard deviation.
CHANGED = 0.7

#: Cells that have to be changed in the 3x3 around a changed one, itself included, for it to count: a smaller speck is
#: texture.
CROWD = 3


@dataclass(frozen=True)
class MaskScores:
    """A mask against the region that truly changes.

    Attributes:
        iou: cells of both over cells of either.
        recall: share of the region that the mask covers.
        precision: share of the mask that lies in the region.
        area: share of the picture.
        area_ratio: area over the region's.
    """

    iou: float
    recall: float
    precision: float
    area: float
    area_ratio: float


def changed_cells(base: Tensor, edit: Tensor) -> Tensor:
    """The cells that differ, bool ``[h, w]``.

    Args:
        base, edit: final latents of one sample, ``[c, h, w]``.
    """
    base, edit = base.double(), edit.double()
    difference = (edit - base).square().mean(0).sqrt()
    changed = difference > CHANGED * base.std()
    crowd = F.avg_pool2d(changed[None].double(), 3, stride=1, padding=1, divisor_override=1)[0]
    return changed & (crowd > CROWD - 0.5)


def score_mask(mask: Tensor, region: Tensor) -> MaskScores | None:
    """How well a mask, bool ``[h, w]``, covers a region of the same shape; None for a region without a cell."""
    both, either = int((mask & region).sum()), int((mask | region).sum())
    inside, true = int(mask.sum()), int(region.sum())
    if not true:
        return None
    return MaskScores(
        iou=both / either,
        recall=both / true,
        precision=both / inside if inside else 0.0,
        area=float(mask.float().mean()),
        area_ratio=inside / true,
    )


def enlarge(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask ``[h, w]`` at a picture's size (height, width): bool ``[H, W]``."""
    return F.interpolate(mask[None, None].float(), size=size, mode="nearest")[0, 0] > 0.5
