"""GroupNorm of rows with given statistics (FISEdit, Yu et al. 2023, section A.2: those of the cached run)."""

from __future__ import annotations

import torch


def group_norm_rows_reference(
    rows: torch.Tensor,
    sample: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``(rows - mean) * rstd * weight + bias`` with the statistics of each row's sample and channel group.

    Args:
        rows: [M, C].
        sample: int64 [M], the batch element of each row.
        mean: [B, G], fp32 or fp64; group g holds the channels [g * C / G, (g + 1) * C / G).
        rstd: [B, G], ``1 / sqrt(variance + eps)``, as ``mean``.
        weight: [C] or None (ones).
        bias: [C] or None (zeros).

    Returns:
        [M, C] in the dtype of ``rows``, computed in fp32 or better.

    Raises:
        IndexError: a sample lies outside [0, B).
        RuntimeError: C is not a multiple of G, or the shapes do not fit.
    """
    compute = torch.promote_types(rows.dtype, torch.float32)
    channels, groups = rows.shape[1], mean.shape[1]
    wide = torch.promote_types(mean.dtype, compute)  # the shift cancels against the rows: round it once, at the end
    # [B, G] -> [B, C]
    mean, scale = (t.to(wide).unsqueeze(2).expand(-1, -1, channels // groups).flatten(1) for t in (mean, rstd))
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale if bias is None else torch.addcmul(bias.to(wide), mean, scale, value=-1)
    scale, shift = (t.to(compute).index_select(0, sample) for t in (scale, shift))  # [B, C] -> [M, C]
    return torch.addcmul(shift, rows.to(compute), scale).to(rows.dtype)
