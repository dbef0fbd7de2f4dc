"""Tensors that stay where they are, as a CUDA graph leaves them, copied together into one new piece of memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fisedit_compile.kernels.indexing.copy_rows_triton import CopyLaunch

_ALIGNMENT = 256  # bytes, as torch's own allocator aligns
_WORD = 16  # bytes, the most that a thread copies at once


class TensorCopies:
    """Copies the same tensors again and again, with the values that they have then; on a GPU by a launch or a few.

    Args:
        sources: at least one, all on one device, each of which :func:`can_be_copied`.

    Attributes:
        starts: the first byte of each in the memory that they are copied to, a multiple of 256.
        nbytes: of that memory.

    Raises:
        ValueError: a source cannot be copied so.
    """

    def __init__(self, sources: Sequence[Tensor]) -> None:
        if not all(map(can_be_copied, sources)):
            raise ValueError(f"a source is not contiguous or at no multiple of {_WORD} bytes; copy it by itself")
        self._sources = list(sources)
        sizes = (-(-source.nbytes // _ALIGNMENT) * _ALIGNMENT for source in sources)
        *self.starts, self.nbytes = accumulate(sizes, initial=0)
        self._launches: list[tuple[CopyLaunch, Tensor]] = []
        if sources[0].is_cuda:
            first = self._memory()
            self._first = first.data_ptr()
            self._launches = launches(sources, self._targets(first))

    def copy(self) -> Tensor:
        """The values of the tensors now, in memory of their own, uint8 ``[nbytes]``; on the current stream."""
        memory = self._memory()
        if not self._launches:
            torch._foreach_copy_(self._targets(memory), self._sources)
        for launch, addresses in self._launches:
            launch.run(addresses, moved=memory.data_ptr() - self._first)
        return memory

    def _memory(self) -> Tensor:
        return torch.empty(self.nbytes, dtype=torch.uint8, device=self._sources[0].device)

    def _targets(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[start : start + source.nbytes].view(source.dtype).view(source.shape)
            for start, source in zip(self.starts, self._sources, strict=True)
        ]


def can_be_copied(source: Tensor) -> bool:
    """Whether a tensor is contiguous and begins where the widest words do."""
    return source.is_contiguous() and source.data_ptr() % _WORD == 0


def launches(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> list[tuple[CopyLaunch, Tensor]]:
    """The launches that copy sources to targets, each with the addresses of its sources.

    One that has an odd number of bytes would have all of its launch copied in small words.
    """
    from fisedit_compile.kernels.indexing.copy_rows_triton import CopyLaunch

    of_word: dict[int, list[int]] = {}
    for i, source in enumerate(sources):
        of_word.setdefault(math.gcd(_WORD, source.nbytes), []).append(i)
    made = []
    for some in of_word.values():
        nothing = [None] * len(some)
        counts = torch.zeros(len(some), dtype=torch.int32, device=sources[0].device)
        launch = CopyLaunch([targets[i] for i in some], nothing, counts, nothing)
        made.append((launch, launch.addresses([sources[i] for i in some])))
    return made
