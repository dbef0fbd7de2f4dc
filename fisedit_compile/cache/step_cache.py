"""What a base keeps of one U-Net call, and whether it is what a sparse graph reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from fisedit_compile.cache.tensors_in_memory import Layout, Piece
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.ir.call import Signature
from fisedit_compile.ir.requests import CacheEntry

#: What the base keeps of one U-Net call.
StepCache = Mapping[CacheEntry, Tensor]


class Recorded(StepCache):
    """The cache of one recorded call: read only, as everything of a base. Two are equal if they are the same object.

    Attributes:
        signature: of the call.
        timesteps: the timesteps of the call that the host knows without waiting for a device, None for others.
        model: the state of the U-Net, a :class:`~fisedit_compile.runtime.model_state.ModelState`.
        piece: the memory in which most of the tensors lie; None where each has its own.
    """

    def __init__(
        self,
        signature: Signature,
        timesteps: tuple[Tensor | None, ...],
        kept: Mapping[CacheEntry, Tensor],
        piece: Piece | None = None,
    ) -> None:
        self.signature = signature
        self.timesteps = timesteps
        self.piece = piece
        self.model: Any = None
        self._kept = dict(kept)

    def without(self, kind: str) -> Recorded:
        """The same cache but for the entries of one kind."""
        return self.with_values({entry: tensor for entry, tensor in self._kept.items() if entry.kind != kind})

    def with_values(self, kept: Mapping[CacheEntry, Tensor]) -> Recorded:
        """The cache of the same call, with other tensors: the same ones elsewhere, or some of them."""
        other = Recorded(self.signature, self.timesteps, kept)
        other.model = self.model
        return other

    def __getitem__(self, entry: CacheEntry) -> Tensor:
        return self._kept[entry]

    def __iter__(self) -> Iterator[CacheEntry]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: tensors that share a piece of memory would each bring all of it along."""
        alone = {
            entry: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
            for entry, tensor in self._kept.items()
        }
        return {**vars(self), "_kept": alone, "piece": None}

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class CacheDescription:
    """The entries that a sparse graph reads of a base, and the shape and dtype of each.

    Args:
        shapes: see :attr:`fisedit_compile.compiler.kept_of_calls.KeptOfCalls.cache_specs`.
    """

    def __init__(self, shapes: Mapping[CacheEntry, tuple[torch.Size, torch.dtype]]) -> None:
        self.shapes = shapes
        self._fitting: WeakSet[Recorded | Layout] = WeakSet()  # what was found to fit

    def check(self, cache: StepCache, signature: Signature, timesteps: tuple[Tensor | None, ...]) -> None:
        """Hold the cache of a call to what the sparse graph reads.

        One that was found to fit is not looked at again, nor another whose tensors lie in its memory in the same way.

        Raises:
            BaseMismatchError: an entry is missing, or is of another shape or dtype, or the call was another one.
        """
        if isinstance(cache, Recorded):
            _check_timesteps(cache.timesteps, timesteps)
            layout = None if cache.piece is None else cache.piece.layout
            if cache in self._fitting or layout in self._fitting:
                return
            if cache.signature.sample_shape != signature.sample_shape:
                raise BaseMismatchError(
                    f"the cache is of a call with latents {cache.signature.sample_shape}, not "
                    f"{signature.sample_shape}: record this one"
                )
        if missing := [entry for entry in self.shapes if entry not in cache]:
            raise BaseMismatchError(
                f"the cache holds nothing for {missing[0].node} and {len(missing) - 1} more: record the call with "
                "this U-Net and this config first"
            )
        for entry, (shape, dtype) in self.shapes.items():
            kept = cache[entry]
            if kept.shape != shape or kept.dtype is not dtype:
                raise BaseMismatchError(
                    f"the cache holds {entry.node} as {tuple(kept.shape)} {kept.dtype}, this call reads {tuple(shape)} "
                    f"{dtype}: record the base with inputs of this batch, size and dtype"
                )
        if isinstance(cache, Recorded):
            self._fitting.add(cache)
            if layout is not None and all(entry in layout.places for entry in self.shapes):
                self._fitting.add(layout)


def _check_timesteps(recorded: tuple[Tensor | None, ...], now: tuple[Tensor | None, ...]) -> None:
    for old, new in zip(recorded, now, strict=False):
        if old is not None and new is not None and not torch.equal(old, new):
            raise BaseMismatchError(
                f"this call is at timestep {new.tolist()}, the recorded one was at {old.tolist()}: a sparse step "
                "repeats the timestep of the recorded call"
            )
