"""Which source pixels each active output pixel of a convolution reads, as an index table made once for each edit."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile.ir.layout import Size
from fisedit_compile.ir.taps import Taps


def neighbour_table(taps: Taps, index: Tensor, source_index: Tensor | None, batch: int) -> tuple[Tensor, Tensor | None]:
    """The neighbour table of a convolution's active output pixels, and the halo that they read.

    Args:
        taps: the geometry of the convolution.
        index: pixel ids of the active output pixels, int64 ``[M]``, sorted.
        source_index: pixel ids of the active source pixels, int64 ``[R]``, sorted. With ``taps.dense`` it is not read
            and may be None.
        batch: samples of the U-Net's batch.

    Returns:
        ``table`` int32 ``[M, kernel_h * kernel_w]``, its taps in the order of a weight's last two dimensions, and
        ``halo`` int64 ``[H]``, sorted: the ids of source pixels that the table reads and that are no rows. An entry in
        ``[0, R)`` is a row, one in ``[R, R + H)`` a halo row, and -1 lies outside the picture. For a dense source the
        entries are pixel ids, and the halo is None. With ``taps.inside`` the halo is None, too, and -1 also stands
        where no row lies between a tap and the kernel's centre.
    """
    if taps.inside:
        assert source_index is not None
        return _table_inside(taps, index, source_index, batch), None
    reads = _reads(taps, batch, index.device).index_select(0, index)  # [M, K]
    outside = batch * taps.source[0] * taps.source[1]
    if taps.dense:
        return reads.masked_fill_(reads == outside, -1).int(), None

    assert source_index is not None
    needed = torch.zeros(outside + 1, dtype=torch.bool, device=index.device)
    needed.scatter_(0, reads.view(-1), True)  # three times as fast as needed[reads] = True, and an edit waits for it
    needed.scatter_(0, source_index, False)
    halo = needed[:outside].nonzero().squeeze(1)
    stored = torch.cat((source_index, halo))  # rows first, then halo rows: as the convolution numbers them
    entry = torch.full_like(needed, -1, dtype=torch.int32)
    entry.scatter_(0, stored, torch.arange(len(stored), dtype=torch.int32, device=index.device))
    return entry.index_select(0, reads.view(-1)).view_as(reads), halo


def _table_inside(taps: Taps, index: Tensor, source_index: Tensor, batch: int) -> Tensor:
    """The table of a source that has nothing but its rows."""
    reads = _reads_of(taps, index, batch)
    outside = batch * taps.source[0] * taps.source[1]
    row_of = torch.full((outside + 1,), -1, dtype=torch.int32, device=index.device)
    row_of.scatter_(0, source_index, torch.arange(len(source_index), dtype=torch.int32, device=index.device))
    entry = row_of.index_select(0, reads.view(-1)).view_as(reads)
    missing = (entry < 0) & (reads != outside)
    found = entry
    for others in _towards_centre(taps.kernel, index.device):
        found = torch.where(missing & (found < 0), entry.index_select(0, others), found)
    return found.t().contiguous()


@lru_cache
def _towards_centre(kernel: Size, device: torch.device) -> tuple[Tensor, ...]:
    """Where a tap is missing, the taps that are tried in its place: int64 ``[kernel_h * kernel_w]`` for each attempt.

    They lie between the tap and the kernel's centre: the nearest first, of equally near ones the one beside; behind the
    last one comes the centre again.
    """
    centre = kernel[1] * (kernel[0] // 2) + kernel[1] // 2
    towards = []
    for y, x in product(range(kernel[0]), range(kernel[1])):
        rows, columns = (
            range(at, middle + 1) if at <= middle else range(at, middle - 1, -1)
            for at, middle in zip((y, x), (kernel[0] // 2, kernel[1] // 2), strict=True)
        )
        between = sorted(product(rows, columns), key=lambda each: (each[0] - y) ** 2 + (each[1] - x) ** 2)
        towards.append([kernel[1] * row + column for row, column in between[1:]])
    longest = max(map(len, towards))
    padded = torch.tensor([each + [centre] * (longest - len(each)) for each in towards]).reshape(len(towards), longest)
    return tuple(padded.t().contiguous().to(device))


def _reads_of(taps: Taps, index: Tensor, batch: int) -> Tensor:
    """int64 ``[kernel_h * kernel_w, M]``: as :func:`_reads`, for some pixels and with the taps first.

    A table of all pixels, which other convolutions share for all edits, would have 42 MB for a picture of 768x768.
    """
    (height, width), columns = taps.source, taps.target[1]
    y, x = (
        _axis_reads_on(taps, axis, index.device).index_select(1, at)  # [kernel, M]
        for axis, at in enumerate((index // columns % taps.target[0], index % columns))
    )
    first = index // (taps.target[0] * columns) * (height * width)
    y, x = y[:, None], x[None]  # [kh, 1, M], [1, kw, M]
    reads = (y * width + x + first).masked_fill_((y < 0) | (x < 0), batch * height * width)
    return reads.flatten(0, 1)


@lru_cache(maxsize=64)  # a copy to a device waits for what runs there
def _axis_reads_on(taps: Taps, axis: int, device: torch.device) -> Tensor:
    """int64 ``[kernel, target]``: :func:`_axis_reads` with the taps first."""
    return _axis_reads(taps, axis).t().contiguous().to(device)


@lru_cache(maxsize=64)  # all edits of a U-Net share the geometry of its convolutions
def _reads(taps: Taps, batch: int, device: torch.device) -> Tensor:
    """int64 ``[batch * target_h * target_w, kernel_h * kernel_w]``: the id of the source pixel that each tap reads.

    A tap outside the picture has the id behind the last pixel's, so that one lookup serves all taps.
    """
    height, width = taps.source
    y, x = (_axis_reads(taps, axis) for axis in (0, 1))  # [TH, kh], [TW, kw]
    outside = (y < 0)[:, None, :, None] | (x < 0)[None, :, None, :]  # [TH, TW, kh, kw]
    reads = (y * width)[:, None, :, None] + x[None, :, None, :]
    first = torch.arange(batch)[:, None, None, None, None] * (height * width)  # each sample's first pixel id
    reads = (reads + first).masked_fill_(outside, batch * height * width)  # [B, TH, TW, kh, kw]
    return reads.flatten(3).flatten(0, 2).to(device)


def _axis_reads(taps: Taps, axis: int) -> Tensor:
    """int64 ``[target, kernel]``: the source coordinate that each tap reads along one axis, -1 outside."""
    starts = torch.arange(taps.target[axis])[:, None] * taps.stride[axis] - taps.padding[axis]
    reads = starts + torch.arange(taps.kernel[axis]) * taps.dilation[axis]
    extent = (taps.upsampled or taps.source)[axis]
    # torch rounds the scale of nearest upsampling to fp32, so only torch itself picks the same pixels in every case
    source = torch.arange(taps.source[axis], dtype=torch.float32)[None, None]
    nearest = F.interpolate(source, size=extent, mode="nearest").long().view(-1)
    return nearest[reads.clamp(0, extent - 1)].masked_fill_((reads < 0) | (reads >= extent), -1)
