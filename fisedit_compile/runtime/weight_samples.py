"""Some values of each of many tensors, read again and again: whether weights were written to.

By value, not by version counters alone: a LoRA is fused by ``weight.data += ...``, which leaves those as they are. A
fine-tune, a LoRA or another seed changes nearly all values of a weight, so a few tell it; to read every byte of a large
U-Net takes up to seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from fisedit_compile.kernels.indexing.copy_rows import RowCopies

#: Values of each tensor that are compared: on a GPU as many, evenly spaced; on the host neighbours in one place, or
#: three of a large tensor.
_VALUES = 16

_LARGE = 1 << 16

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_SLOT = _VALUES * 16  # bytes for the values of one tensor, of the widest dtype


class WeightSamples:
    """Samples of tensors on one device, taken where these lie now."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():  # the buffers are written to at each look
            make = _SamplesOnGPU if tensors[0].is_cuda else _SamplesOnHost
            self._samples: _SamplesOnGPU | _SamplesOnHost = make(tensors)
            self._before = self._samples.take().clone()

    def have_changed(self) -> bool:
        """Whether any sampled value is another one than at the last call."""
        with torch.inference_mode(False), torch.no_grad():
            now = self._samples.take()
            if torch.equal(now, self._before):  # bytes: a value that is not a number equals itself
                return False
            self._before = now.clone()
            return True

    def values(self) -> list[bytes]:
        """The sampled values of each tensor, of the last call."""
        return self._samples.split(self._before.cpu())


class _SamplesOnHost:
    """Short runs of neighbouring values, joined by one concatenation for each width of values.

    A run takes 0.3 us; single values from all over a tensor take 2 us a tensor.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._groups: dict[int, list[Tensor]] = {}  # bytes a value -> tensors
        self._order: list[int] = []
        for i in sorted(range(len(tensors)), key=lambda i: tensors[i].element_size()):
            self._groups.setdefault(tensors[i].element_size(), []).append(tensors[i])
            self._order.append(i)
        self._runs = {id(each): _runs(each) for each in tensors if _is_block(each)}

    def take(self) -> Tensor:
        """The sampled values of all tensors, as bytes."""
        runs = self._runs
        joined = [
            torch.cat(list(chain.from_iterable(runs.get(id(each)) or _runs(each) for each in group)))
            for group in self._groups.values()
        ]
        return torch.cat([each.view(torch.uint8) for each in joined])

    def split(self, taken: Tensor) -> list[bytes]:
        """Those of each tensor, of what was taken."""
        sizes = [sum(run.nbytes for run in _runs(each)) for group in self._groups.values() for each in group]
        parts = dict(zip(self._order, taken.split(sizes), strict=True))
        return [parts[i].numpy().tobytes() for i in range(len(parts))]


class _SamplesOnGPU:
    """One launch for all tensors, each of which has a slot of bytes."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device
        where = [_places(each.shape, each.stride()) for each in tensors]
        index = torch.cat(where).to(device).split([len(each) for each in where])
        self._counts = [len(places) * each.element_size() for places, each in zip(where, tensors, strict=True)]
        self._taken = torch.zeros(len(tensors) * _SLOT, dtype=torch.uint8, device=device)
        slots = [
            slot[:count].view(each.dtype)[:, None]
            for slot, count, each in zip(self._taken.split(_SLOT), self._counts, tensors, strict=True)
        ]
        counts = torch.tensor([len(each) for each in where], dtype=torch.int32, device=device)
        self._copies = RowCopies(slots, index, counts)
        self._sources = self._copies.addresses([_memory(each)[:, None] for each in tensors])

    def take(self) -> Tensor:
        """The sampled values of all tensors, as bytes."""
        self._copies.run(self._sources)
        return self._taken

    def split(self, taken: Tensor) -> list[bytes]:
        """Those of each tensor, of what was taken."""
        return [slot[:count].numpy().tobytes() for slot, count in zip(taken.split(_SLOT), self._counts, strict=True)]


def _runs(tensor: Tensor) -> list[Tensor]:
    """Some of the first values of a tensor, of a large one some in the middle and the last, too, as integers
    of their width; views where there are no gaps.
    """
    flat = _memory(tensor) if _is_block(tensor) else tensor.detach().flatten()
    real = torch.view_as_real(flat).flatten() if flat.is_complex() else flat
    values = real.view(_INTEGERS[real.element_size()])
    count = len(values)
    if count <= _LARGE:
        return [values[:_VALUES]]
    return [values[start : start + _VALUES] for start in (0, count // 2, count - _VALUES)]


def _is_block(tensor: Tensor) -> bool:
    """Whether the values lie without gaps, in any order."""
    return _span(tensor) == tensor.numel()


def _memory(tensor: Tensor) -> Tensor:
    """All the memory from a tensor's first element to its last, as one dimension."""
    return tensor.detach().as_strided((_span(tensor),), (1,))


def _span(tensor: Tensor) -> int:
    """Elements from the first to the last in memory, gaps included."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return reach + 1 if tensor.numel() else 0


@lru_cache(maxsize=1024)  # the parameters of a U-Net have a hundred shapes
def _places(shape: torch.Size, strides: tuple[int, ...]) -> Tensor:
    """int64 ``[<= _VALUES]``: where sampled elements lie in memory; the same elements whatever the memory format."""
    count = math.prod(shape)
    positions = torch.arange(0, count, max(1, -(-count // _VALUES)))
    along = zip(torch.unravel_index(positions, shape), strides, strict=True)
    return sum((coordinate * stride for coordinate, stride in along), torch.zeros_like(positions))
