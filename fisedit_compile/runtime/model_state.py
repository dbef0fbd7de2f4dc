"""``ModelState``: what decides how a model behaves, to tell whether it is still the same one.

That is every plain value that its modules, attention processors, adapters and hooks hold, its config, and the bytes of
its parameters and buffers. A state is plain data: it holds no module and no tensor.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.runtime.state_words import differing_names, differing_values, weights_in_words

if TYPE_CHECKING:
    from fisedit_compile.runtime.model_watch import ModelWatch


@dataclass(frozen=True)
class Live:
    """What is known of a model in this process alone.

    Attributes:
        watch: what made the state; it holds the model.
        tensors: an id of each tensor, that of no other one while a graph holds it, and the device that it lies on.
        addresses: where each tensor lies.
        stamps: a number for each tensor, another one for other values.
    """

    watch: weakref.ref[ModelWatch]
    tensors: tuple[Any, ...]
    addresses: tuple[int, ...]
    stamps: tuple[int, ...]


class ModelState:
    """The state of a model at one time; made by :class:`~fisedit_compile.runtime.model_watch.ModelWatch`.

    Two states are equal when the models behave alike, in this process or another one, on whatever device.

    Attributes:
        values: path -> plain value; see :class:`~fisedit_compile.runtime.description.Description`.
        behaviour: a hexadecimal digest of the values and names, the same in every process.
        names: path of each parameter, buffer or other tensor.
        live: see :class:`Live`; None for one that was pickled or saved.
    """

    def __init__(self, values: Mapping[str, Any], behaviour: str, names: tuple[str, ...], live: Live | None) -> None:
        self.values, self.behaviour, self.names, self.live = values, behaviour, names, live
        self._checksums: tuple[str, ...] | None = None

    @classmethod
    def of_another_process(
        cls, values: Mapping[str, Any], behaviour: str, names: tuple[str, ...], checksums: tuple[str, ...]
    ) -> ModelState:
        """The state of a model that is not here: what another process knew of it, its checksums read there."""
        state = cls(values, behaviour, names, live=None)
        state._checksums = checksums
        return state

    def checksums(self) -> tuple[str, ...]:
        """A checksum of each tensor; read from the model once, while it is in this state, and kept.

        Raises:
            BaseMismatchError: the model has changed before they were read.
        """
        if self._checksums is None:
            assert self.live is not None
            watch = self.live.watch()
            if watch is None:
                raise BaseMismatchError("the U-Net is gone, and its weights were not read: generate again")
            self._checksums = watch.read_checksums(self)
        return self._checksums

    def digest(self) -> str:
        """A hexadecimal key, the same in every process: of the behaviour and all bytes of all tensors.

        Raises:
            BaseMismatchError: the model has changed, and its weights were not read before.
        """
        return hashlib.sha256(" ".join((self.behaviour, *self.checksums())).encode()).hexdigest()[:32]

    def difference(self, other: ModelState) -> str:
        """What distinguishes the other state, as a clause ``"FreeU: off -> on; ..."``; empty when nothing does."""
        if self is other:
            return ""
        clauses = []
        if self.behaviour != other.behaviour:
            clauses = differing_values(self.values, other.values) or ["what its modules hold"]
        weights = self._differing_weights(other)
        if clauses:  # weights that came or went with an adapter or a layer are said with it
            weights = [name for name in weights if name in self.names and name in other.names]
        return "; ".join([*clauses, weights_in_words(weights)] if weights else clauses)

    def _differing_weights(self, other: ModelState) -> list[str]:
        """Names of tensors with other values, or that only one of the two has."""
        written = list(self.names)
        if self.live is not None and other.live is not None and self.live.watch == other.live.watch:
            before, after = (
                dict(zip(each.names, each.live.stamps, strict=True)) for each in (self, other) if each.live
            )
            written = differing_names(before, after)
            if not written:
                return []
        try:
            read = [dict(zip(each.names, each.checksums(), strict=True)) for each in (self, other)]
        except BaseMismatchError:  # written to before they were read: what is known is that they were
            return written
        return differing_names(*read)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelState) and not self.difference(other)

    def __hash__(self) -> int:
        return hash(self.behaviour)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelState:
        return self  # it never changes

    def __getstate__(self) -> dict[str, Any]:
        checksums = self.checksums()
        return {**vars(self), "values": dict(self.values), "live": None, "_checksums": checksums}
