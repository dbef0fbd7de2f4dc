"""Whole tensors copied many at a time, by a launch or a few on a GPU: from where they stay, or to where they stay."""

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
    """Copies the same tensors again and again, with the values that they have then, into one new piece of memory.

    Args:
        sources: at least one, all on one device, each of which :func:`can_be_copied`; they stay where they are, as a
            CUDA graph leaves them.

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
            self._launches = [
                (launch, launch.addresses([self._sources[i] for i in some]))
                for launch, some in launches(self._targets(first))
            ]

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


class PartCopies:
    """Fills the same places again and again, each time from other tensors, of which each is cut into equal parts.

    Args:
        targets: of each source the places of its parts, contiguous and alike; on one device.
    """

    def __init__(self, targets: Sequence[Sequence[Tensor]]) -> None:
        self._targets = [list(parts) for parts in targets]
        flat = [part for parts in self._targets for part in parts]
        self._launches = launches(flat) if flat and flat[0].is_cuda else []

    def addresses(self, sources: Sequence[Tensor]) -> Sequence[Tensor]:
        """The sources in the form that :meth:`run` takes, which is of use as long as they live and stay where they are.

        Args:
            sources: contiguous, of the dtype, device and shape of their parts but for the rows, which are those of all
                parts, one behind the other. On a GPU they begin at multiples of 16 bytes.

        Raises:
            ValueError: a source that does not fit its parts.
        """
        starts: list[int] = []
        for source, parts in zip(sources, self._targets, strict=True):
            first = parts[0]
            alike = source.dtype is first.dtype and source.device == first.device and source.is_contiguous()
            shape = first.shape if len(parts) == 1 else (len(parts) * len(first), *first.shape[1:])
            if not alike or source.shape != shape:
                raise ValueError(
                    f"a source {list(source.shape)} {source.dtype} on {source.device} for {len(parts)} parts "
                    f"{list(first.shape)} {first.dtype} on {first.device}; give a contiguous one that fits"
                )
            start = source.data_ptr()
            if self._launches and start % _WORD:
                raise ValueError(f"a source begins at no multiple of {_WORD} bytes: clone it")
            starts += [start + i * first.nbytes for i in range(len(parts))]
        return [launch.table([starts[i] for i in some]) for launch, some in self._launches] or list(sources)

    def run(self, addresses: Sequence[Tensor]) -> None:
        """Copy, on the current stream; ``addresses`` is a result of :meth:`addresses`."""
        if self._launches:
            for (launch, _), table in zip(self._launches, addresses, strict=True):
                launch.run(table)
            return
        for source, parts in zip(addresses, self._targets, strict=True):
            torch._foreach_copy_(parts, [source] if len(parts) == 1 else source.tensor_split(len(parts)))


def can_be_copied(source: Tensor) -> bool:
    """Whether a tensor is contiguous and begins where the widest words do."""
    return source.is_contiguous() and source.data_ptr() % _WORD == 0


def launches(targets: Sequence[Tensor]) -> list[tuple[CopyLaunch, list[int]]]:
    """The launches that fill targets with whole tensors, and which of the targets each of them fills.

    One target that has an odd number of bytes would have all of its launch copied in small words.
    """
    from fisedit_compile.kernels.indexing.copy_rows_triton import CopyLaunch

    of_word: dict[int, list[int]] = {}
    for i, target in enumerate(targets):
        of_word.setdefault(math.gcd(_WORD, target.nbytes, target.data_ptr()), []).append(i)
    made = []
    for some in of_word.values():
        nothing = [None] * len(some)
        counts = torch.zeros(len(some), dtype=torch.int32, device=targets[0].device)
        made.append((CopyLaunch([targets[i] for i in some], nothing, counts, nothing), some))
    return made
