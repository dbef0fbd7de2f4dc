"""LayerNorm of rows: as torch's own, but it may be told how many of the rows are real."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def layer_norm_rows_reference(
    rows: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """Normalise each row to mean 0 and variance 1, then scale and shift its channels.

    Args:
        rows: [M, C].
        weight, bias: [C] or None.
        eps: is added to the variance.
        count: int32 [1], how many rows are real, see ``ops``; the reference computes padded rows as well.

    Returns:
        [M, C].
    """
    return F.layer_norm(rows, rows.shape[1:], weight, bias, eps)
