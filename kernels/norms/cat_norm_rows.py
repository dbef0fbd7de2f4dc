"""Rows of two values side by side, and their group norm with the base's statistics.

A U-Net does this where a skip connection from its way down joins the way up.
"""

from __future__ import annotations

import torch

from fisedit_compile.kernels.norms.group_norm_rows import group_norm_rows_reference


def cat_norm_rows_reference(
    left: torch.Tensor,
    right: torch.Tensor,
    sample: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    silu: bool = False,
    count: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cat([left, right], 1)``, and ``group_norm_rows`` of that.

    Args:
        left, right: [M, C1] and [M, C2].
        sample, scale, shift, silu, count: as of ``group_norm_rows`` for C = C1 + C2 channels.

    Returns:
        [M, C] each: the joined rows, and their norm.
    """
    rows = torch.cat([left, right], 1)
    return rows, group_norm_rows_reference(rows, sample, scale, shift, silu, count)
