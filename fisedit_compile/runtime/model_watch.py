"""``ModelWatch``: looks at a live model, and gives its :class:`ModelState`."""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn

from fisedit_compile.errors import BaseMismatchError, CaptureError
from fisedit_compile.runtime.description import Description
from fisedit_compile.runtime.model_state import Live, ModelState
from fisedit_compile.runtime.state_words import differing_values
from fisedit_compile.runtime.watched_tensors import WatchedTensors
from fisedit_compile.utils.exchanged_functions import exchanged_functions


class ModelWatch:
    """Watches a model, which it holds.

    While nothing has changed, a look takes some 2 ms for Stable Diffusion 2's U-Net and 4 ms for SDXL's; when something
    has, what modules hold is described again (25 and 60 ms). `benchmarks/model_look.py` measures a look.

    Args:
        module: any model; another one is another watch.

    Attributes:
        descriptions: how often something had changed, so that what modules hold was described again.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._lock = threading.RLock()
        self._description: Description | None = None
        self._weights = WatchedTensors({})
        self._state: ModelState | None = None
        self.descriptions = 0

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

    def form(self) -> str | None:
        """A digest of all that the graphs of the model depend on, as it is now: all but the values of its weights.

        None where no digest can say all of it: a function of a library is exchanged, or a processor or a hook holds a
        tensor, whose values an export may take over as numbers.
        """
        with self._lock:
            behaviour, tensors = self.look().behaviour, self._weights.tensors
            kinds = [(path, each.shape, each.stride(), each.dtype, each.device) for path, each in tensors.items()]
            own = {id(each) for each in chain(self.module.parameters(), self.module.buffers())}
            if exchanged_functions() or not own.issuperset(map(id, tensors.values())):
                return None
            return hashlib.sha256(repr((behaviour, kinds)).encode()).hexdigest()

    def _describe(self) -> None:
        before, self._description = self._description, Description(self.module)
        self.descriptions += 1
        tensors = self._description.tensors
        if not _same_tensors(self._weights.tensors, tensors):
            self._weights = self._weights.succeeded_by(tensors)
            self._state = None
        if before is not None and before.digest != self._description.digest:
            self._state = None

    def _take_state(self) -> ModelState:
        assert self._description is not None
        weights = self._weights
        live = Live(
            watch=weakref.ref(self),
            tensors=tuple((id(each), each.device) for each in weights.tensors.values()),
            addresses=tuple(weights.addresses),
            stamps=weights.stamps(),
        )
        return ModelState(self._description.values, self._description.digest, tuple(weights.tensors), live)

    def read_checksums(self, state: ModelState) -> tuple[str, ...]:
        """A checksum of each tensor, while the model is in ``state``.

        Raises:
            BaseMismatchError: it no longer is.
        """
        with self._lock:
            now = self.look()
            same = now.live is not None and state.live is not None and now.live.stamps == state.live.stamps
            if not same or now.behaviour != state.behaviour:  # it may have moved to another device
                raise BaseMismatchError("the U-Net has changed since, before its weights were read: generate again")
            return self._weights.checksums()

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
                    if not changes and not _same_tensors(before.tensors, after.tensors):
                        changes = ["other weights"]
                    if changes:
                        before.restore()
            if changes:
                raise CaptureError(
                    f"{doing} changes what it holds ({'; '.join(changes)}): a graph is exported once, and would "
                    "never do so again. Take off the attention processor or hook that stores or counts"
                )


def _same_tensors(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(a is b for a, b in zip(first.values(), second.values(), strict=True))
