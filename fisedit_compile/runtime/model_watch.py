"""``ModelWatch``: looks at a live model, and gives its :class:`ModelState`."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fisedit_compile.errors import BaseMismatchError, CaptureError
from fisedit_compile.runtime.checksums import checksums
from fisedit_compile.runtime.description import Description
from fisedit_compile.runtime.model_state import Live, ModelState
from fisedit_compile.runtime.state_words import differing_values
from fisedit_compile.runtime.weight_samples import WeightSamples


class ModelWatch:
    """Watches a model, which it holds.

    A look takes 1.5 ms for the U-Net of Stable Diffusion 2 and 5 ms for that of SDXL on one core, while nothing has
    changed; when something has, what modules hold is described again (25 and 60 ms).

    Args:
        module: any model; another one is another watch.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._lock = threading.RLock()
        self._description: Description | None = None
        self._weights = _Weights({})
        self._state: ModelState | None = None

    def look(self, *, values: bool = True) -> ModelState:
        """The model's state now: the same object as at the last look, while nothing has changed.

        Args:
            values: look at sampled values of the weights, too, and not only at version counters and addresses. On a GPU
                this waits for the device.
        """
        with self._lock:
            described = self._description is not None and self._description.is_current()
            if not described:
                self._describe()
            if self._weights.look(values) or self._state is None:
                self._state = self._take_state()
            return self._state

    def _describe(self) -> None:
        before, self._description = self._description, Description(self.module)
        tensors = self._description.tensors
        if not _same_tensors(self._weights.tensors, tensors):
            self._weights = _Weights(tensors, self._weights)
            self._state = None
        if before is not None and before.values != self._description.values:
            self._state = None

    def _take_state(self) -> ModelState:
        assert self._description is not None
        weights = self._weights
        live = Live(
            watch=weakref.ref(self),
            tensors=tuple((id(each), each.device) for each in weights.tensors.values()),
            addresses=tuple(weights.addresses),
            stamps=tuple(weights.stamps),
        )
        return ModelState(self._description.values, tuple(weights.tensors), live)

    def read_checksums(self, state: ModelState) -> tuple[str, ...]:
        """A checksum of each tensor, while the model is in ``state``.

        Raises:
            BaseMismatchError: it no longer is.
        """
        with self._lock:
            if self.look() is not state:
                raise BaseMismatchError("the U-Net has changed since, before its weights were read: generate again")
            return self._weights.read_checksums()

    @contextmanager
    def left_alone(self, doing: str) -> Iterator[None]:
        """Hold what runs within the context to leaving the model as it is; what it changed is put back.

        Raises:
            CaptureError: it changed what a module, processor or hook holds.
        """
        with self._lock:
            self.look()
            before = self._description
            assert before is not None
            changes: list[str] = []
            try:
                yield
            finally:
                if not before.is_current():
                    after = Description(self.module)
                    changes = differing_values(before.values, after.values)
                    if changes or not _same_tensors(before.tensors, after.tensors):
                        before.restore()
            if changes:
                raise CaptureError(
                    f"{doing} changes what it holds ({'; '.join(changes)}): a graph is captured once, and would "
                    "never do so again. Take off the attention processor or hook that stores or counts, and run it apart"
                )


class _Weights:
    """The tensors of a model: where they lie, a stamp for each value that they had, and checksums.

    Args:
        tensors: path -> tensor.
        before: those that were watched until now; tensors that are among both keep their stamps and checksums.
    """

    _next_stamp = itertools.count(1)

    def __init__(self, tensors: dict[str, Tensor], before: _Weights | None = None) -> None:
        self.tensors = tensors
        self._list = list(tensors.values())
        known = {id(each): i for i, each in enumerate(before._list)} if before else {}
        places = [known.get(id(each)) for each in self._list]
        self.stamps = [next(self._next_stamp) if p is None else before.stamps[p] for p in places]  # type: ignore[union-attr]
        self._checksums = [None if p is None else before._checksums[p] for p in places]  # type: ignore[union-attr]
        self._sampled: list[bytes | None] = [None if p is None else before._sampled[p] for p in places]  # type: ignore[union-attr]
        self._versions = [None if p is None else before._versions[p] for p in places]  # type: ignore[union-attr]
        self.addresses: list[int] = []
        self._samples: list[tuple[list[int], WeightSamples]] = []

    def look(self, values: bool) -> bool:
        """Whether a tensor was written to or moved since the last look."""
        versions = list(map(_version, self._list))
        addresses = list(map(Tensor.data_ptr, self._list))
        moved = addresses != self.addresses
        if moved:
            self.addresses = addresses
            self._samples = self._sample()
        changed = moved or versions != self._versions
        if values or changed:  # of every device: each look renews what later ones are compared with
            changed |= any([samples.have_changed() for _, samples in self._samples])  # noqa: C419
        if not changed:
            return False
        for places, samples in self._samples:
            for place, sampled in zip(places, samples.values(), strict=True):
                if sampled != self._sampled[place] or versions[place] != self._versions[place]:
                    if self._sampled[place] is not None:
                        self.stamps[place] = next(self._next_stamp)
                        self._checksums[place] = None
                    self._sampled[place] = sampled
        self._versions = versions
        return True

    def _sample(self) -> list[tuple[list[int], WeightSamples]]:
        places: dict[torch.device, list[int]] = {}
        for i, each in enumerate(self._list):
            if not each.is_meta and each.numel():
                places.setdefault(each.device, []).append(i)
        return [(group, WeightSamples([self._list[i] for i in group])) for group in places.values()]

    def read_checksums(self) -> tuple[str, ...]:
        unread = [i for i, each in enumerate(self._checksums) if each is None]
        for i, each in zip(unread, checksums([self._list[i] for i in unread]), strict=True):
            self._checksums[i] = each
        return tuple(each for each in self._checksums if each is not None)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(a is b for a, b in zip(first.values(), second.values(), strict=True))
