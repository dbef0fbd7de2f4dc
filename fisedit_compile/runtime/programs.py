"""The programs of a model that changes: kept for its last few states, so that going back to one exports nothing."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from fisedit_compile.ir.call import Call, Signature
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.runtime.program import Program

#: Each may hold graphs and constants of some hundred megabytes on a GPU.
_STATES = 4

_Key = tuple[object, ...]

_Program = TypeVar("_Program", bound=Program)


class Programs(Generic[_Program]):
    """The programs of one model, for each state that it was in lately and each signature of its calls.

    Weights that were written in place are no other state here: programs read them where they lie.

    Args:
        build: makes the program of a call, of the model as it is.
    """

    def __init__(self, build: Callable[[Call], _Program]) -> None:
        self._build = build
        self._states: OrderedDict[_Key, dict[Signature, _Program]] = OrderedDict()
        self._current: tuple[ModelState, dict[Signature, _Program]] | None = None

    def of(self, call: Call, state: ModelState) -> _Program:
        """The program of a call for the model in ``state``, which is the present one; built on first use."""
        if self._current is None or self._current[0] is not state:
            self._current = state, self._programs(state)
        programs = self._current[1]
        if call.signature not in programs:
            programs[call.signature] = self._build(call)
        programs[call.signature].follow(state)
        return programs[call.signature]

    def __iter__(self) -> Iterator[_Program]:
        for programs in self._states.values():
            yield from programs.values()

    def clear(self) -> None:
        """Let go of all of them."""
        self._states.clear()
        self._current = None

    def _programs(self, state: ModelState) -> dict[Signature, _Program]:
        assert state.live is not None
        # Ids are safe here: while programs are kept, they keep their parameters alive.
        key = (state.behaviour, state.live.tensors)
        self._states.setdefault(key, {})
        self._states.move_to_end(key)
        while len(self._states) > _STATES:
            self._states.popitem(last=False)
        return self._states[key]
