"""How rows in a few bits a value are made and read; ``row_format.py`` says what they are."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fisedit_compile.kernels.indexing.row_format import TILE, RowFormat


def mean_of_tiles(rows: Tensor, size: tuple[int, int]) -> Tensor:
    """Rows ``[B*H*W, *channels]`` of a map of ``size`` (H, W) -> the mean of each tile, ``[tiles, *channels]``.

    Tiles at the lower and right edge of a map of odd size have fewer pixels.
    """
    pixels = rows.reshape(-1, *size, rows[0].numel()).permute(0, 3, 1, 2)
    means = F.avg_pool2d(pixels, TILE, ceil_mode=True, count_include_pad=False)
    return means.permute(0, 2, 3, 1).reshape(-1, *rows.shape[1:])


def pack_rows_reference(rows: Tensor, bits: int) -> Tensor:
    """Rows ``[R, *channels]`` in ``bits`` a value, uint8 ``[R, RowFormat.nbytes]``.

    A group with a value that is not finite comes back as NaN.
    """
    form = RowFormat(tuple(rows.shape[1:]), rows.dtype, bits)
    count, each = rows.shape[0], 8 // bits
    values = rows.reshape(count, form.width)
    padding = form.groups * form.group - form.width
    last = values[:, -1:].expand(count, padding)  # changes neither end of the last group's range
    grouped = torch.cat([values, last], 1).view(count, form.groups, form.group)
    exact = torch.promote_types(rows.dtype, torch.float32)
    low, high = (end.to(exact) for end in (grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)))
    step = ((high - low) / (2**bits - 1)).to(rows.dtype)
    spread = step.to(exact)
    codes = torch.floor((grouped.to(exact) - low) / torch.where(spread == 0, 1, spread) + 0.5)
    codes = codes.nan_to_num(0.0).clamp(0, 2**bits - 1).to(torch.uint8).unflatten(-1, (-1, each)).flatten(1, 2)
    packed = rows.new_zeros(count, form.nbytes, dtype=torch.uint8)
    ends = torch.cat([low.to(rows.dtype), step], -1).flatten(1)
    packed[:, : form.header] = ends.contiguous().view(torch.uint8)
    taken = -(-form.width // each)
    shifts = torch.arange(each, dtype=torch.uint8, device=rows.device) * bits
    packed[:, form.header : form.header + taken] = (codes << shifts).sum(-1, dtype=torch.uint8)[:, :taken]
    return packed


def unpack_rows_reference(packed: Tensor, form: RowFormat) -> Tensor:
    """The rows ``[R, *channels]`` of what :func:`pack_rows_reference` made of such rows."""
    count, each = packed.shape[0], 8 // form.bits
    ends = packed[:, : form.header].contiguous().view(form.dtype).view(count, form.groups, 2)
    shifts = torch.arange(each, dtype=torch.uint8, device=packed.device) * form.bits
    codes = (packed[:, form.header :, None] >> shifts & 2**form.bits - 1).flatten(1)[:, : form.width]
    group = torch.arange(form.width, device=packed.device) // form.group
    exact = torch.promote_types(form.dtype, torch.float32)
    low, step = ends.to(exact).index_select(1, group).unbind(-1)
    return torch.addcmul(low, codes.to(exact), step).to(form.dtype).view(count, *form.channels)
