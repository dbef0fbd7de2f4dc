"""The tensors of a model over time: where they lie, whether they were written to, and a checksum of each value."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from fisedit_compile.runtime.checksums import checksums
from fisedit_compile.runtime.weight_samples import WeightSamples

_VERSION = operator.attrgetter("_version")


@dataclass
class _Watched:
    """One tensor, as it was at the last look."""

    tensor: Tensor
    stamp: int
    version: int | None = None
    sampled: bytes | None = None
    checksum: str | None = None


@dataclass
class WatchedTensors:
    """The tensors of a model, by path.

    Attributes:
        tensors: path -> tensor.
        addresses: where each of them lies.
    """

    tensors: dict[str, Tensor]
    addresses: list[int] = field(default_factory=list)

    _stamps: ClassVar = itertools.count(1)

    def __post_init__(self) -> None:
        self._watched = [_Watched(each, next(self._stamps)) for each in self.tensors.values()]
        self._samples: list[tuple[list[_Watched], WeightSamples]] = []

    def succeeded_by(self, tensors: dict[str, Tensor]) -> WatchedTensors:
        """These tensors instead; what is known of those that are among both is kept."""
        successor = WatchedTensors(tensors)
        known = {id(each.tensor): each for each in self._watched}
        successor._watched = [known.get(id(each.tensor), each) for each in successor._watched]
        return successor

    def stamps(self) -> tuple[int, ...]:
        """A number for each tensor, another one for other values."""
        return tuple(each.stamp for each in self._watched)

    def look(self, values: bool) -> bool:
        """Whether a tensor was written to or moved since the last look; ``values``: look at sampled values, too."""
        tensors = list(self.tensors.values())
        versions, addresses = _versions(tensors), list(map(Tensor.data_ptr, tensors))
        changed = versions != [each.version for each in self._watched]
        if addresses != self.addresses:
            changed = True
            self.addresses = addresses
            self._samples = self._sample()
        if values or changed:  # of every device: each look renews what later ones are compared with
            changed |= sum(samples.have_changed() for _, samples in self._samples) > 0
        if not changed:
            return False
        for watched, version in zip(self._watched, versions, strict=True):
            if watched.version not in (None, version):
                watched.stamp, watched.checksum = next(self._stamps), None
            watched.version = version
        for group, samples in self._samples:
            for watched, sampled in zip(group, samples.values(), strict=True):
                if watched.sampled not in (None, sampled):
                    watched.stamp, watched.checksum = next(self._stamps), None
                watched.sampled = sampled
        return True

    def checksums(self) -> tuple[str, ...]:
        """A checksum of each tensor; only those are read that were written to since they were read last."""
        unread = [each for each in self._watched if each.checksum is None]
        for watched, checksum in zip(unread, checksums([each.tensor for each in unread]), strict=True):
            watched.checksum = checksum
        return tuple(str(each.checksum) for each in self._watched)

    def _sample(self) -> list[tuple[list[_Watched], WeightSamples]]:
        groups: dict[torch.device, list[_Watched]] = {}
        for watched in self._watched:
            if not watched.tensor.is_meta and watched.tensor.numel():
                groups.setdefault(watched.tensor.device, []).append(watched)
        return [(group, WeightSamples([each.tensor for each in group])) for group in groups.values()]


def _versions(tensors: list[Tensor]) -> list[int]:
    try:
        return list(map(_VERSION, tensors))
    except RuntimeError:  # tensors made in inference mode have none
        return [0 if each.is_inference() else each._version for each in tensors]
