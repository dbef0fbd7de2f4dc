"""Tensors that lie in one piece of memory, each made of it by a single operation.

A thread hands the interpreter's lock over at each operation of torch, and may have to wait for it afterwards. So what
threads do for hundreds of tensors at a time is done in as few operations as can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

#: Bytes of the largest element that a tensor can have.
_ELEMENT = 16


@dataclass(frozen=True)
class Place:
    """Where a contiguous tensor lies in a piece of memory: its first byte, a multiple of its elements' size."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Of the tensor, in elements; worked out once for places that are used again and again."""
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= max(size, 1)
        return tuple(reversed(strides))


@dataclass(frozen=True, eq=False)
class Layout:
    """How tensors lie in a piece of memory. Pieces that are filled in the same way share one of these objects.

    Attributes:
        places: of each tensor, by what it is called.
    """

    places: Mapping[Any, Place]


@dataclass(frozen=True, eq=False)
class Piece:
    """A piece of memory, uint8 ``[n]``, and how tensors lie in it."""

    memory: Tensor
    layout: Layout


def tensors_in(memory: Tensor, places: Iterable[Place]) -> list[Tensor]:
    """The tensors at some places of a piece of memory, uint8 ``[n]``, which begins at a multiple of 16 bytes."""
    typed: dict[torch.dtype, Tensor] = {}
    tensors = []
    for place in places:
        if place.dtype not in typed:
            typed[place.dtype] = memory[: len(memory) // _ELEMENT * _ELEMENT].view(place.dtype)
        whole = typed[place.dtype]
        first = whole.storage_offset() + place.start // place.dtype.itemsize
        tensors.append(whole.as_strided(place.shape, place.strides, first))
    return tensors
