"""Which source pixels an active target pixel of a convolution reads, as an index table made once an edit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class Taps:
    """Geometry of a convolution's neighbour table; every pair is (height, width).

    Attributes:
        source: size of the map that is stored; with ``upsampled``, the map before upsampling.
        target: size of the convolution's output.
        kernel, stride, padding, dilation: of the convolution, zero padding on both sides alike.
        upsampled: the source is nearest-upsampled to this size before the convolution. The table reads the small
            map itself, so the upsampled map is never made.
        dense: the source is a dense pixel-major map: entries are pixel ids of ``source``, there is no halo.

    Raises:
        ValueError: a value out of range, or ``target`` is not what this convolution gives for the source.
    """

    source: Size
    target: Size
    kernel: Size
    stride: Size
    padding: Size
    dilation: Size
    upsampled: Size | None = None
    dense: bool = False

    def __post_init__(self) -> None:
        read = self.upsampled or self.source
        for name, size, least in (
            ("source", self.source, 1),
            ("target", self.target, 1),
            ("kernel", self.kernel, 1),
            ("stride", self.stride, 1),
            ("padding", self.padding, 0),
            ("dilation", self.dilation, 1),
            ("upsampled", read, 1),
        ):
            if len(size) != 2 or min(size) < least:
                raise ValueError(f"Taps.{name} is {size}; give (height, width), each at least {least}")
        output = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(read, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        )
        if output != tuple(self.target):
            raise ValueError(
                f"Taps.target is {self.target}, but a {self.kernel} convolution over {read} with stride "
                f"{self.stride}, padding {self.padding}, dilation {self.dilation} gives {output}; "
                "give the convolution's output size"
            )

    def __str__(self) -> str:
        def x(size: Size) -> str:
            return f"{size[0]}x{size[1]}"

        upsampled = f" upsampled to {x(self.upsampled)}" if self.upsampled else ""
        return (
            f"{'dense ' if self.dense else ''}{x(self.source)}{upsampled} -> {x(self.target)}, "
            f"kernel {x(self.kernel)}, stride {x(self.stride)}, padding {x(self.padding)}, "
            f"dilation {x(self.dilation)}"
        )


def neighbour_table(taps: Taps, index: Tensor, source_index: Tensor | None, batch: int) -> tuple[Tensor, Tensor | None]:
    """The neighbour table of the active target pixels and the halo it reads.

    Args:
        taps: the convolution.
        index: pixel ids of the active target pixels, int64 ``[M]``, sorted.
        source_index: those of the active source pixels, int64 ``[R]``, sorted. Not read, and may be None, if
            ``taps.dense``.
        batch: samples in the U-Net batch.

    Returns:
        ``table`` int32 ``[M, kernel_h * kernel_w]``, taps in the order of a weight's last two dims, and ``halo``
        int64 ``[Hh]``, sorted pixel ids of the source: the pixels that the table reads and that are not rows. An entry
        in ``[0, R)`` is a row, in ``[R, R + Hh)`` a halo row, and -1 lies outside the picture. For a dense source
        entries are pixel ids and halo is None.
    """
    reads = _reads(taps, batch, index.device).index_select(0, index)  # [M, K]
    outside = batch * taps.source[0] * taps.source[1]
    if taps.dense:
        return reads.masked_fill_(reads == outside, -1).int(), None

    assert source_index is not None
    needed = torch.zeros(outside + 1, dtype=torch.bool, device=index.device)
    needed.scatter_(0, reads.view(-1), True)  # a third of what needed[reads] = True takes, and an edit waits for it
    needed.scatter_(0, source_index, False)
    halo = needed[:outside].nonzero().squeeze(1)
    stored = torch.cat((source_index, halo))  # in the order in which the convolution finds them
    entry = torch.full_like(needed, -1, dtype=torch.int32)
    entry.scatter_(0, stored, torch.arange(len(stored), dtype=torch.int32, device=index.device))
    return entry.index_select(0, reads.view(-1)).view_as(reads), halo


@lru_cache(maxsize=64)  # the geometry of a U-Net's convolutions is that of all its edits
def _reads(taps: Taps, batch: int, device: torch.device) -> Tensor:
    """int64 ``[batch * target_h * target_w, kernel_h * kernel_w]``: the source pixel that each tap of a pixel reads.

    One id past the last pixel stands for all that is outside the picture, so that one lookup serves all entries.
    """
    height, width = taps.source
    y, x = (_axis_reads(taps, axis) for axis in (0, 1))  # [TH, kh], [TW, kw]
    outside = (y < 0)[:, None, :, None] | (x < 0)[None, :, None, :]  # [TH, TW, kh, kw]
    reads = (y * width)[:, None, :, None] + x[None, :, None, :]
    first = torch.arange(batch)[:, None, None, None, None] * (height * width)  # of each sample
    reads = (reads + first).masked_fill_(outside, batch * height * width)  # [B, TH, TW, kh, kw]
    return reads.flatten(3).flatten(0, 2).to(device)


def _axis_reads(taps: Taps, axis: int) -> Tensor:
    """int64 ``[target, kernel]``: the source coordinate that each tap reads along one axis, -1 outside."""
    starts = torch.arange(taps.target[axis])[:, None] * taps.stride[axis] - taps.padding[axis]
    reads = starts + torch.arange(taps.kernel[axis]) * taps.dilation[axis]
    extent = (taps.upsampled or taps.source)[axis]
    # torch's own nearest rule: it rounds its scale to fp32, so floor(i * in / out) in integers is not always the same
    source = torch.arange(taps.source[axis], dtype=torch.float32)[None, None]
    nearest = F.interpolate(source, size=extent, mode="nearest").long().view(-1)
    return nearest[reads.clamp(0, extent - 1)].masked_fill_((reads < 0) | (reads >= extent), -1)
