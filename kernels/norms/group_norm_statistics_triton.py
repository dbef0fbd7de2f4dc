"""Statistics of a GroupNorm over many pixels on the GPU, as ``kernels/ops.py`` calls them.

A first kernel takes the mean and the squared deviations of each channel over blocks of pixels; a second one joins those
of a group (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
Sums of squares would lose the variance of values that lie far from zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fisedit_compile.kernels.launch.triton_launch import check_dtypes, launch

#: Pixels and channels of a program of the first kernel, 32 values a thread.
_PIXELS, _CHANNELS = 64, 64


@triton.jit
def _block_statistics_kernel(
    rows: tl.tensor,  # [samples * pixels, channels]
    means: tl.tensor,  # fp32 [samples, blocks, channels]
    deviations: tl.tensor,  # fp32 [samples, blocks, channels]: sums of squared deviations from the mean of the block
    pixels: tl.tensor,
    channels: tl.tensor,
    BP: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    sample, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p = block * BP + tl.arange(0, BP)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]  # [BP, BC]
    at = (sample * pixels + p)[:, None] * channels + c[None, :]
    x = tl.load(rows + at, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / tl.minimum(pixels - block * BP, BP)
    centred = tl.where(inside, x - mean[None, :], 0.0)
    to = (sample * tl.num_programs(1) + block) * channels + c
    tl.store(means + to, mean, mask=c < channels)
    tl.store(deviations + to, tl.sum(centred * centred, axis=0), mask=c < channels)


@triton.jit
def _join_statistics_kernel(
    means: tl.tensor,  # fp32 [samples, blocks, channels]
    deviations: tl.tensor,
    weight: tl.tensor,  # [channels] or None
    bias: tl.tensor,  # [channels] or None
    scale: tl.tensor,  # fp32 [samples, channels]
    shift: tl.tensor,
    pixels: tl.tensor,
    blocks: tl.tensor,
    channels: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,  # channels of a group
    BP: tl.constexpr,  # pixels of a block
    BB: tl.constexpr,  # blocks that are joined at a time
    BC: tl.constexpr,  # WIDTH, rounded up to a power of two
) -> None:
    sample = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BC)
    column = tl.program_id(1) * WIDTH + c
    first = sample * blocks * channels
    mean = 0.0
    for start in range(0, blocks, BB):
        b = start + tl.arange(0, BB)
        inside = (b < blocks)[:, None] & (c < WIDTH)[None, :]  # [BB, BC]
        count = tl.minimum(pixels - b * BP, BP)[:, None]
        part = tl.load(means + first + b.to(tl.int64)[:, None] * channels + column[None, :], mask=inside, other=0.0)
        mean += tl.sum(tl.sum(part * count, axis=1), axis=0)
    mean /= pixels * WIDTH
    deviation = 0.0
    for start in range(0, blocks, BB):
        b = start + tl.arange(0, BB)
        inside = (b < blocks)[:, None] & (c < WIDTH)[None, :]
        count = tl.minimum(pixels - b * BP, BP)[:, None]
        at = first + b.to(tl.int64)[:, None] * channels + column[None, :]
        apart = tl.load(means + at, mask=inside, other=0.0) - mean
        part = tl.load(deviations + at, mask=inside, other=0.0) + tl.where(inside, count * apart * apart, 0.0)
        deviation += tl.sum(tl.sum(part, axis=1), axis=0)
    factor = tl.zeros((BC,), dtype=tl.float32) + tl.rsqrt(deviation / (pixels * WIDTH) + eps)
    if weight is not None:
        factor *= tl.load(weight + column, mask=c < WIDTH, other=0.0).to(tl.float32)
    offset = -mean * factor
    if bias is not None:
        offset += tl.load(bias + column, mask=c < WIDTH, other=0.0).to(tl.float32)
    tl.store(scale + sample * channels + column, factor, mask=c < WIDTH)
    tl.store(shift + sample * channels + column, offset, mask=c < WIDTH)


def group_norm_statistics_triton(
    rows: torch.Tensor,
    samples: int,
    groups: int,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``group_norm_statistics`` on one GPU; its reference describes the arguments.

    Raises:
        ValueError: the kernel does not take the dtype, or samples or groups do not divide the rows or channels.
    """
    check_dtypes("group_norm_statistics", rows)
    count, channels = rows.shape
    if not count or count % samples or channels % groups:
        raise ValueError(
            f"group_norm_statistics: rows [{count}, {channels}] for {samples} samples and {groups} groups; give as "
            "many rows of each sample, at least one, and groups of as many channels"
        )
    rows = rows.contiguous()
    pixels, width = count // samples, channels // groups
    blocks = triton.cdiv(pixels, _PIXELS)
    means, deviations = rows.new_empty(2, samples, blocks, channels, dtype=torch.float32)
    scale, shift = rows.new_empty(2, samples, channels, dtype=torch.float32)
    launch(_block_statistics_kernel, (samples, blocks, triton.cdiv(channels, _CHANNELS)), rows)(
        rows, means, deviations, pixels, channels, BP=_PIXELS, BC=_CHANNELS, num_warps=4
    )
    block = triton.next_power_of_2(width)
    launch(_join_statistics_kernel, (samples, groups), rows)(
        means,
        deviations,
        weight,
        bias,
        scale,
        shift,
        pixels,
        blocks,
        channels,
        eps,
        WIDTH=width,
        BP=_PIXELS,
        BB=max(1, min(triton.next_power_of_2(blocks), 4096 // block)),
        BC=block,
        num_warps=4,
    )
    return scale, shift
