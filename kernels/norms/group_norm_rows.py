"""GroupNorm of rows: with the statistics of the base (FISEdit, Yu et al. 2023, section A.2), or with their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from fisedit_compile.kernels.implicit_gemm.epilogue import scale_and_shift


def group_norm_rows_reference(
    rows: torch.Tensor,
    sample: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    silu: bool = False,
    count: torch.Tensor | None = None,
) -> torch.Tensor:
    """``rows * scale[sample] + shift[sample]``: a group norm whose statistics, weight and bias are in scale and shift.

    Args:
        rows: [M, C].
        sample: int64 [M], the batch element of each row.
        scale: [B, C], fp32 or fp64: ``weight / sqrt(variance + eps)``.
        shift: [B, C]: ``bias - mean * scale``.
        silu: apply SiLU to the result.
        count: int32 [1], how many rows are real, see ``ops``; the reference computes padded rows as well.

    Returns:
        [M, C] in the dtype of ``rows``, computed in fp32 or better.

    Raises:
        IndexError: a sample lies outside [0, B).
        RuntimeError: the shapes do not fit.
    """
    normed = scale_and_shift(rows, sample, scale, shift)
    return F.silu(normed) if silu else normed


def group_norm_whole_reference(
    rows: torch.Tensor,
    samples: int,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool = False,
) -> torch.Tensor:
    """GroupNorm of maps all of whose pixels are rows, with the maps' own statistics.

    Args:
        rows: [samples * S, C], sample by sample.
        samples: how many maps there are.
        groups: into how many groups of neighbouring channels C divides.
        weight, bias: [C] or None.
        eps: is added to the variance.
        silu: apply SiLU to the result.

    Returns:
        [samples * S, C].

    Raises:
        RuntimeError: the samples do not divide the rows, or the groups do not divide the channels.
    """
    maps = rows.view(samples, -1, rows.shape[1]).transpose(1, 2)  # [B, C, S]
    normed = F.group_norm(maps, groups, weight, bias, eps).transpose(1, 2).reshape(rows.shape)
    return F.silu(normed) if silu else normed


def group_norm_statistics_reference(
    rows: torch.Tensor,
    samples: int,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift of a GroupNorm of maps all of whose pixels are rows, as ``group_norm_rows`` takes them.

    Args:
        rows: [samples * S, C], sample by sample.
        samples, groups, weight, bias, eps: see :func:`group_norm_whole_reference`.

    Returns:
        [samples, C] each, in fp32 or better.

    Raises:
        RuntimeError: the samples do not divide the rows, or the groups do not divide the channels.
    """
    maps = rows.view(samples, -1, rows.shape[1]).transpose(1, 2)  # [B, C, S]
    return norm_scale_shift(maps, groups, weight, bias, eps)


def norm_scale_shift(
    x: torch.Tensor, groups: int, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift that a group norm applies to a map, in fp32 or better.

    Args:
        x: [B, C, H, W] or [B, C, pixels].
        groups, weight, bias, eps: of the group norm; weight and bias are [C] or None.

    Returns:
        [B, C] each: ``x * scale + shift`` is the norm of x, for each sample and channel.
    """
    batch, channels = x.shape[:2]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide.reshape(batch, groups, -1), dim=2, correction=0)
    scale, mean = (
        each[:, :, None].expand(-1, -1, channels // groups).flatten(1) for each in (torch.rsqrt(variance + eps), mean)
    )
    if weight is not None:
        scale = scale * weight
    shift = -mean * scale
    return scale.contiguous(), (shift if bias is None else shift + bias)
