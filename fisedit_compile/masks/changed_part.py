"""Which part of a mask an edit changed in the end.

A mask that is found by what the first steps of an edit do is taken with a cell around it, since what it misses of the
old picture stays there. Behind the last step the final latents say what really changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisedit_compile.masks.difference_mask import close_holes

#: A cell is as it was if its final latents differ by no more than this share of the standard deviation of the base's,
#: as a root mean square over channels: half of what makes a cell count as truly changed where quality is measured.
UNCHANGED = 0.35


def changed_part(mask: Tensor, base: Tensor, edit: Tensor) -> Tensor:
    """The cells of a mask whose final latents are others than the base's, and gaps of up to two cells between them.

    Args:
        mask: bool ``[n, h, w]``.
        base, edit: final latents, ``[n, c, h, w]``. What is not finite in an edit counts as changed.

    Returns:
        bool ``[n, h, w]``, part of ``mask``. The mask of a sample that hardly changes anywhere is left as it is.
    """
    base, edit = base.float(), edit.float()
    unchanged = (edit - base).square().mean(1).sqrt() <= UNCHANGED * base.flatten(1).std(1)[:, None, None]
    part = mask & close_holes(mask & ~unchanged)
    return torch.where(part.any(2).any(1)[:, None, None], part, mask)
