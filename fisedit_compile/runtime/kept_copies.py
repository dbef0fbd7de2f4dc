"""What a recorded call leaves, taken to memory of its own before the next call overwrites it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fisedit_compile.cache.tensors_in_memory import Layout, Piece, Place, tensors_in
from fisedit_compile.ir.requests import CacheEntry
from fisedit_compile.kernels.indexing.copy_tensors import TensorCopies, can_be_copied
from fisedit_compile.runtime.cuda_graph import copied


class KeptCopies:
    """Copies what a graph leaves of each call: all but attention maps into one piece of memory, by a launch or a few.

    A call leaves hundreds of tensors, whose copies the host launches more slowly one by one than the graph runs. Maps
    are of as many tokens as are asked for, and are let go of before the rest, so that each is a piece of its own.

    Args:
        entries: of the call, in the order in which the graph leaves their values.
    """

    def __init__(self, entries: Sequence[CacheEntry]) -> None:
        self._entries = list(entries)
        self._of: Sequence[Tensor] | None = None
        self._layout = Layout({})  # of the values that are copied together
        self._copies: TensorCopies | None = None

    def take(self, values: Sequence[Tensor], tokens: int | None) -> tuple[dict[CacheEntry, Tensor], Piece | None]:
        """The values in memory of their own, and the piece in which most of them lie.

        Args:
            values: of all entries; the same object for each replay of a graph.
            tokens: of how many tokens attention maps are wanted; None is all.
        """
        if self._of is not values:
            self._prepare(values)
        apart = {
            entry: value[..., :tokens] if entry.kind == "attention" else value
            for entry, value in zip(self._entries, values, strict=True)
            if entry not in self._layout.places
        }
        kept = copied(apart)
        piece = None
        if self._copies is not None:
            piece = Piece(self._copies.copy(), self._layout)
            places = self._layout.places
            kept |= zip(places, tensors_in(piece.memory, places.values()), strict=True)
        return {entry: kept[entry] for entry in self._entries}, piece

    def _prepare(self, values: Sequence[Tensor]) -> None:
        together = {
            entry: value
            for entry, value in zip(self._entries, values, strict=True)
            if entry.kind != "attention" and can_be_copied(value)
        }
        self._copies = TensorCopies([*together.values()]) if together else None
        starts = [] if self._copies is None else self._copies.starts
        self._layout = Layout(
            {
                entry: Place(start, value.dtype, value.shape)
                for start, (entry, value) in zip(starts, together.items(), strict=True)
            }
        )
        self._of = values
