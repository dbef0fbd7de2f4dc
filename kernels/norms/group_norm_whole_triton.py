"""GroupNorm of maps all of whose pixels are rows, with their own statistics, on the GPU: ``kernels/ops.py`` calls it.

A program normalises one group of one sample. It keeps its first pixels in registers, which are all of them at the low
resolutions that this is for. Further pixels it reads three times: for the mean, for the variance and to normalise them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.launch.triton_launch import check_dtypes, launch

_GROUP_VALUES = 16384  # that a program keeps in registers


@triton.jit
def _normalise(at, x, mean, factor, shift, inside, SILU: tl.constexpr):  # type: ignore[no-untyped-def]
    """Normalise pixels x fp32 [BP, BC] and store them at the addresses ``at``; factor and shift are [BC]."""
    y = (x - mean) * factor[None, :] + shift[None, :]
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(at, y.to(at.dtype.element_ty), mask=inside)


@triton.jit
def _group_norm_whole_kernel(
    rows: tl.tensor,  # [samples * pixels, channels]
    weight: tl.tensor,  # [channels] or None
    bias: tl.tensor,  # [channels] or None
    out: tl.tensor,  # [samples * pixels, channels]
    pixels: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,  # channels of a group
    BP: tl.constexpr,
    BC: tl.constexpr,  # WIDTH, rounded up to a power of two
    SILU: tl.constexpr,
) -> None:
    first = tl.program_id(0).to(tl.int64) * pixels
    c = tl.arange(0, BC)
    column = tl.program_id(1) * WIDTH + c  # [BC]
    p = tl.arange(0, BP)
    inside = (p < pixels)[:, None] & (c < WIDTH)[None, :]  # [BP, BC]
    at = (first + p)[:, None] * channels + column[None, :]
    size = pixels * WIDTH
    x = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(tl.sum(x, axis=1), axis=0)
    for start in range(BP, pixels, BP):
        more = inside & (start + p < pixels)[:, None]
        y = tl.load(rows + at + start * channels, mask=more, other=0.0).to(tl.float32)
        mean += tl.sum(tl.sum(y, axis=1), axis=0)
    mean /= size
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(tl.sum(centred * centred, axis=1), axis=0)
    for start in range(BP, pixels, BP):
        more = inside & (start + p < pixels)[:, None]
        y = tl.load(rows + at + start * channels, mask=more, other=0.0).to(tl.float32)
        centred = tl.where(more, y - mean, 0.0)
        variance += tl.sum(tl.sum(centred * centred, axis=1), axis=0)
    factor = tl.zeros((BC,), dtype=tl.float32) + tl.rsqrt(variance / size + eps)
    shift = tl.zeros((BC,), dtype=tl.float32)
    if weight is not None:
        factor *= tl.load(weight + column, mask=c < WIDTH, other=0.0).to(tl.float32)
    if bias is not None:
        shift += tl.load(bias + column, mask=c < WIDTH, other=0.0).to(tl.float32)
    _normalise(out + at, x, mean, factor, shift, inside, SILU)
    for start in range(BP, pixels, BP):
        more = inside & (start + p < pixels)[:, None]
        y = tl.load(rows + at + start * channels, mask=more, other=0.0).to(tl.float32)
        _normalise(out + at + start * channels, y, mean, factor, shift, more, SILU)


def group_norm_whole_triton(
    rows: torch.Tensor,
    samples: int,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    silu: bool = False,
) -> torch.Tensor:
    """``group_norm_whole`` on one GPU; its reference describes the arguments.

    Raises:
        ValueError: the kernel does not take the dtype, or samples or groups do not divide the rows or channels.
    """
    check_dtypes("group_norm_whole", rows)
    count, channels = rows.shape
    if count % samples or channels % groups:
        raise ValueError(
            f"group_norm_whole: rows [{count}, {channels}] for {samples} samples and {groups} groups; give as many "
            "rows of each sample, and groups of as many channels"
        )
    rows = rows.contiguous()
    out = torch.empty_like(rows)
    if out.numel() == 0:
        return out
    width = channels // groups
    block = triton.next_power_of_2(width)
    pixels = count // samples
    height = min(triton.next_power_of_2(pixels), max(1, _GROUP_VALUES // block))
    launch(_group_norm_whole_kernel, (samples, groups), rows)(
        rows,
        weight,
        bias,
        out,
        pixels,
        channels,
        eps,
        WIDTH=width,
        BP=height,
        BC=block,
        SILU=silu,
        num_warps=16,
    )
    return out
