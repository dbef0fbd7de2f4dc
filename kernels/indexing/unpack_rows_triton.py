"""The launch behind ``RowCopies`` for packed sources: each program unpacks rows of one target; a table says which."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit_compile.kernels.indexing.row_format import EIGHT, RowFormat
from fisedit_compile.kernels.launch.triton_launch import launch

_ROWS, _CHANNELS = 32, 128  # that a program unpacks

_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _unpack_rows_kernel(
    sources: tl.tensor,  # int64 [N]: the address of each source
    targets: tl.tensor,  # int64 [N]: the address of each target
    indices: tl.tensor,  # int64 [N]: the address of the rows that a target takes, int64 each; 0 for all, in order
    counts: tl.tensor,  # int32 [N]: how many rows are real, of a target that has an index
    forms: tl.tensor,  # int32 [N, 5]: rows, width, channels of a group, bytes ahead of the codes, bytes of a row
    programs: tl.tensor,  # int32 [programs, 3]: target, first row, first channel
    VALUE: tl.constexpr,  # the dtype of the values
    CODES: tl.constexpr,  # the dtype of eight codes
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether eight channels are 16 bytes that start at a multiple of 16
    BR: tl.constexpr,
    BC: tl.constexpr,
) -> None:
    at = programs + tl.program_id(0) * 3
    copy = tl.load(at)
    row = tl.load(at + 1) + tl.arange(0, BR)  # [BR]
    eight = tl.load(at + 2) // 8 + tl.arange(0, BC // 8)  # [BC / 8]: a thread has eight channels in a row
    form = forms + copy * 5
    rows, width, group = tl.load(form), tl.load(form + 1), tl.load(form + 2)
    header, nbytes = tl.load(form + 3), tl.load(form + 4)
    index = tl.load(indices + copy)
    real = row < rows
    taken = row.to(tl.int64)
    if index != 0:
        real = row < tl.load(counts + copy)
        taken = tl.load(index.to(tl.pointer_type(tl.int64)) + row, mask=real, other=0)
    inside = real[:, None] & (eight * 8 < width)[None, :]  # [BR, BC / 8]
    start = tl.load(sources + copy) + taken * nbytes  # [BR], int64
    ends = start.to(tl.pointer_type(VALUE))[:, None] + 2 * (eight * 8 // group)[None, :]
    low = tl.load(ends, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(ends + 1, mask=inside, other=0.0).to(tl.float32)
    codes = (start + header).to(tl.pointer_type(CODES))[:, None] + eight[None, :]
    word = tl.load(codes, mask=inside, other=0).to(tl.int32)
    among = tl.arange(0, 8)
    code = (word[:, :, None] >> (among * BITS)[None, None, :]) & (2**BITS - 1)  # [BR, BC / 8, 8]
    value = low[:, :, None] + step[:, :, None] * code.to(tl.float32)
    channel = eight[:, None] * 8 + among[None, :]  # [BC / 8, 8]
    target = tl.load(targets + copy).to(tl.pointer_type(VALUE)) + row.to(tl.int64)[:, None, None] * width
    target = target + channel[None, :, :]
    written = inside[:, :, None]
    if ALIGNED:
        target = tl.max_contiguous(tl.multiple_of(target, [1, 1, 16]), [1, 1, 8])
    else:
        written = written & (channel < width)[None, :, :]
    tl.store(target, value.to(VALUE), mask=written)


class UnpackLaunch:
    """The tables of the launches, which depend on the targets and are made once; arguments as of ``RowCopies``."""

    def __init__(
        self,
        targets: Sequence[Tensor],
        indices: Sequence[Tensor | None],
        counts: Tensor,
        formats: Sequence[RowFormat | None],
    ) -> None:
        self._keep = (targets, indices)
        self._counts, device = counts, counts.device
        forms: list[tuple[int, int, int, int, int]] = []
        programs: dict[tuple[torch.dtype, int, bool], list[tuple[int, int, int]]] = {}
        for i, (target, form) in enumerate(zip(targets, formats, strict=True)):
            if form is None:
                forms.append((0, 0, 1, 0, 0))
                continue
            forms.append((len(target), form.width, form.group, form.header, form.nbytes))
            aligned = form.dtype.itemsize == 2 and form.width % EIGHT == 0 and target.data_ptr() % 16 == 0
            programs.setdefault((form.dtype, form.bits, aligned), []).extend(
                (i, row, first) for row in range(0, len(target), _ROWS) for first in range(0, form.width, _CHANNELS)
            )
        self._forms = torch.tensor(forms, dtype=torch.int32).reshape(-1, 5).to(device)
        self._programs = {
            kind: torch.tensor(rows, dtype=torch.int32).to(device) for kind, rows in programs.items() if rows
        }
        self._targets = torch.tensor([target.data_ptr() for target in targets], dtype=torch.int64).to(device)
        self._indices = torch.tensor(
            [0 if index is None else index.data_ptr() for index in indices], dtype=torch.int64
        ).to(device)

    def run(self, addresses: Tensor) -> None:
        """Launch on the current stream; ``addresses`` is a result of ``CopyLaunch.addresses``, of all sources."""
        for (dtype, bits, aligned), programs in self._programs.items():
            launch(_unpack_rows_kernel, (len(programs),), self._counts)(
                addresses,
                self._targets,
                self._indices,
                self._counts,
                self._forms,
                programs,
                VALUE=_TRITON_DTYPES[dtype],
                CODES=tl.int32 if bits == 4 else tl.uint16,
                BITS=bits,
                ALIGNED=aligned,
                BR=_ROWS,
                BC=_CHANNELS,
                num_warps=4,
            )
