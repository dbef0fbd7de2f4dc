"""Masks that grow."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def grown(mask: Tensor, cells: int = 1) -> Tensor:
    """A mask, bool ``[n, h, w]``, grown by as many cells in all eight directions."""
    wide, high = (1, 2 * cells + 1), (2 * cells + 1, 1)  # a square is a row of columns: two short passes
    across = F.max_pool2d(mask[:, None].float(), wide, stride=1, padding=(0, cells))
    return F.max_pool2d(across, high, stride=1, padding=(cells, 0))[:, 0] > 0
