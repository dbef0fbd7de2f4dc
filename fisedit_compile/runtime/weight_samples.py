"""Some values of each of many tensors, read again and again: whether weights were written to.

By value, not by version counters alone: a LoRA is fused by ``weight.data += ...``, which leaves those as they are. A
fine-tune, a LoRA or another seed changes nearly all values of a weight, so a few tell it; to read every byte of a large
U-Net takes up to seconds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, chain

import torch
from torch import Tensor

from fisedit_compile.kernels.indexing.copy_rows import RowCopies

#: Values of each tensor that are compared: on a GPU as many, evenly spaced; on the host neighbours in some places.
_VALUES = 16

_RUNS = 4

_SLOT = _VALUES * 16  # bytes for the values of one tensor, of the widest dtype


def sample_weights(tensors: Sequence[Tensor]) -> SamplesOnGPU | SamplesOnHost:
    """Samples of tensors on one device, taken where these lie now."""
    with torch.inference_mode(False), torch.no_grad():  # the buffers are written to at each look
        return (SamplesOnGPU if tensors[0].is_cuda else SamplesOnHost)(tensors)


class SamplesOnHost:
    """Short runs of neighbouring values, joined as bytes.

    A run takes 0.04 us; to join tensors instead of bytes takes ten times as long, and single values from all over them
    fifty times.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._runs = [_runs(each) if _is_block(each) else None for each in tensors]  # of others there is no view
        self._before = self._take()

    def have_changed(self) -> bool:
        """Whether any sampled value is another one than at the last call."""
        before, self._before = self._before, self._take()
        return before != self._before

    def values(self) -> list[bytes]:
        """The sampled values of each tensor, of the last call."""
        sizes = [sum(map(len, runs or _runs(each))) for runs, each in zip(self._runs, self._tensors, strict=True)]
        ends = list(accumulate(sizes))
        return [self._before[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def _take(self) -> bytes:
        return b"".join(
            chain.from_iterable(runs or _runs(each) for runs, each in zip(self._runs, self._tensors, strict=True))
        )


class SamplesOnGPU:
    """Single values from all over each tensor, brought together by one launch."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device
        where = [_places(each.shape, each.stride()) for each in tensors]
        index = torch.cat(where).to(device).split([len(each) for each in where])
        self._sizes = [len(places) * each.element_size() for places, each in zip(where, tensors, strict=True)]
        # Bytes, so that one comparison does for all dtypes, and a value that is not a number equals itself.
        self._now = torch.zeros(len(tensors) * _SLOT, dtype=torch.uint8, device=device)
        slots = [
            slot[:size].view(each.dtype)[:, None]
            for slot, size, each in zip(self._now.split(_SLOT), self._sizes, tensors, strict=True)
        ]
        counts = torch.tensor([len(each) for each in where], dtype=torch.int32, device=device)
        self._copies = RowCopies(slots, index, counts)
        self._sources = self._copies.addresses([_memory(each)[:, None] for each in tensors])
        self._copies.run(self._sources)
        self._before = self._now.clone()

    def have_changed(self) -> bool:
        """Whether any sampled value is another one than at the last call; waits for the device."""
        with torch.inference_mode(False), torch.no_grad():
            self._copies.run(self._sources)
            if torch.equal(self._now, self._before):
                return False
            self._before.copy_(self._now)
            return True

    def values(self) -> list[bytes]:
        """The sampled values of each tensor, of the last call."""
        slots = self._before.cpu().split(_SLOT)
        return [slot[:size].numpy().tobytes() for slot, size in zip(slots, self._sizes, strict=True)]


def _runs(tensor: Tensor) -> list[memoryview]:
    """The bytes of some of the first values; of a large tensor of the last ones and some between, too.

    They are views of its memory if that has no gaps.
    """
    flat = _memory(tensor) if _is_block(tensor) else tensor.detach().flatten().contiguous()
    data = flat.view(torch.uint8).numpy().data
    size = _VALUES * tensor.element_size()
    if len(data) <= _RUNS * size:
        return [data]
    starts = [i * (len(data) - size) // (_RUNS - 1) for i in range(_RUNS)]
    return [data[start : start + size] for start in starts]


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
