"""The launch behind ``RowCopies``: each program copies some rows of one target; a table says which."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisedit_compile.kernels.indexing.row_format import RowFormat
from fisedit_compile.kernels.launch.triton_launch import launch

_ROWS, _WORDS = 16, 128  # that a program copies


@triton.jit
def _copy_rows_kernel(
    sources: tl.tensor,  # int64 [N]: the address of each source
    targets: tl.tensor,  # int64 [N]: the address of each target
    indices: tl.tensor,  # int64 [N]: the address of the rows that a target takes, int64 each; 0 for all, in order
    counts: tl.tensor,  # int32 [N]: how many rows are real, of a target that has an index
    widths: tl.tensor,  # int32 [N]: words of a row
    totals: tl.tensor,  # int64 [N]: words of a target
    programs: tl.tensor,  # int32 [programs, 3]: target, first row, first word of the row
    WORD: tl.constexpr,  # the dtype of a word
    BYTES: tl.constexpr,  # all addresses and lengths of rows are multiples of it
    BR: tl.constexpr,
    BW: tl.constexpr,
) -> None:
    at = programs + tl.program_id(0) * 3
    copy = tl.load(at)
    row = tl.load(at + 1) + tl.arange(0, BR)  # [BR]
    word = tl.load(at + 2) + tl.arange(0, BW)  # [BW]
    width = tl.load(widths + copy)
    index = tl.load(indices + copy)
    to = row.to(tl.int64)[:, None] * width + word[None, :]  # [BR, BW]
    inside = (word < width)[None, :] & (to < tl.load(totals + copy))
    taken = row.to(tl.int64)
    if index != 0:
        real = row < tl.load(counts + copy)
        taken = tl.load(index.to(tl.pointer_type(tl.int64)) + row, mask=real, other=0)
        inside = inside & real[:, None]
    source = tl.load(sources + copy).to(tl.pointer_type(WORD)) + taken[:, None] * width + word[None, :]
    target = tl.load(targets + copy).to(tl.pointer_type(WORD)) + to
    if BYTES == 16:  # two words a thread
        source = tl.max_contiguous(tl.multiple_of(source, [1, 16]), [1, 2])
        target = tl.max_contiguous(tl.multiple_of(target, [1, 16]), [1, 2])
    tl.store(target, tl.load(source, mask=inside, other=0), mask=inside)


class CopyLaunch:
    """The tables of a launch, which depend on the targets and are made once; arguments as of ``RowCopies``.

    Whoever makes it keeps targets and indices alive: the tables are of their addresses. Targets whose sources are
    packed are left alone, see ``unpack_rows_triton``.
    """

    def __init__(
        self,
        targets: Sequence[Tensor],
        indices: Sequence[Tensor | None],
        counts: Tensor,
        formats: Sequence[RowFormat | None],
    ) -> None:
        self._plain = [i for i, form in enumerate(formats) if form is None]
        self._counts, device = counts, counts.device
        row_bytes = [math.prod(target.shape[1:]) * target.element_size() for target in targets]
        # A target without an index is copied as one run of bytes, cut into rows as wide as a program.
        sizes = [
            target.numel() * target.element_size() if index is None else size
            for target, index, size in zip(targets, indices, row_bytes, strict=True)
        ]
        plain = [(sizes[i], targets[i].data_ptr()) for i in self._plain]
        self.bytes = math.gcd(16, *(each for pair in plain for each in pair))
        word = min(self.bytes, 8)
        self._word = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.int8}[word]
        widths = [_WORDS if index is None else size // word for index, size in zip(indices, row_bytes, strict=True)]
        totals = [target.numel() * target.element_size() // word for target in targets]
        self._programs = _programs(tuple(self._plain), tuple(widths), tuple(totals)).to(device)
        self._widths = torch.tensor(widths, dtype=torch.int32, device=device)
        self._totals = torch.tensor(totals, dtype=torch.int64, device=device)
        self._targets = _table([target.data_ptr() for target in targets], device)
        self._indices = _table([0 if index is None else index.data_ptr() for index in indices], device)

    def addresses(self, sources: Sequence[Tensor]) -> Tensor:
        """The addresses of the sources, on the device. They come from pinned memory, so that the host need not wait."""
        if any(sources[i].data_ptr() % self.bytes for i in self._plain):
            raise ValueError(
                f"a source does not start at a multiple of {self.bytes} bytes, as the targets do: clone it"
            )
        return self.table([source.data_ptr() for source in sources])

    def table(self, addresses: Sequence[int]) -> Tensor:
        """Addresses of the sources, multiples of :attr:`bytes`, in the form that :meth:`run` takes."""
        return _table(addresses, self._counts.device)

    def run(self, addresses: Tensor, *, moved: int = 0) -> None:
        """Launch on the current stream; ``addresses`` is a result of :meth:`addresses`.

        Args:
            moved: by how many bytes, a multiple of 16, all targets lie further on than those given.
        """
        if not len(self._programs):
            return
        launch(_copy_rows_kernel, (len(self._programs),), self._counts)(
            addresses,
            self._targets + moved if moved else self._targets,
            self._indices,
            self._counts,
            self._widths,
            self._totals,
            self._programs,
            WORD=self._word,
            BYTES=self.bytes,
            BR=_ROWS,
            BW=_WORDS,
            num_warps=4,
        )


@functools.lru_cache(maxsize=64)
def _programs(copies: tuple[int, ...], widths: tuple[int, ...], totals: tuple[int, ...]) -> Tensor:
    """What each program copies, int32 ``[programs, 3]``: a target, its first row, and the first word of the rows.

    It is the same for each base of a batch, and read only.

    Args:
        copies: the targets.
        widths, totals: of all targets, words of a row and of the target.
    """
    rows = [-(-totals[i] // (max(widths[i], 1) * _ROWS)) for i in copies]
    across = [-(-widths[i] // _WORDS) for i in copies]
    counts = torch.tensor([down * wide for down, wide in zip(rows, across, strict=True)], dtype=torch.int64)
    each = torch.repeat_interleave(torch.arange(len(copies)), counts)
    within = torch.arange(len(each)) - (counts.cumsum(0) - counts)[each]
    wide = torch.tensor(across, dtype=torch.int64)[each]
    found = [torch.tensor(copies, dtype=torch.int64)[each], within // wide * _ROWS, within % wide * _WORDS]
    return torch.stack(found, 1).to(torch.int32)


def _table(values: Sequence[int], device: torch.device) -> Tensor:
    table = torch.tensor(values, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table
