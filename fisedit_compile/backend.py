"""The torch.compile backend ``"fisedit"``: the same passes for those who compile their U-Net anyway.

    unet = torch.compile(pipe.unet, backend="fisedit")
    with fisedit_compile.backend.recording() as base:
        unet(sample, timestep, text)                # dense; what edits need goes to ``base``
    with fisedit_compile.backend.editing(base, mask):
        unet(sample, timestep, new_text)            # sparse: only the mask is computed anew

Outside both contexts the compiled U-Net is what ``inductor`` makes of it. What torch.compile does not see, the backend
does not see either: a hook that a module is given after the first call counts only with
``torch._dynamo.config.skip_nnmodule_hook_guards = False``.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._inductor import list_mode_options, list_options
from torch.fx import GraphModule

from fisedit_compile.cache.step_cache import Recorded
from fisedit_compile.compiler.dynamo_graph import ModelGraph, kinds_of_inputs
from fisedit_compile.compiler.lower import lower
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import BaseMismatchError
from fisedit_compile.ir.call import Call, bind
from fisedit_compile.runtime.capturable import refuse_autocast
from fisedit_compile.runtime.model_state import ModelState
from fisedit_compile.runtime.model_watch import ModelWatch
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.runtime.program import Program
from fisedit_compile.runtime.programs import Programs


@dataclass
class Recording:
    """The calls that ran within :func:`recording`, in order: which compiled U-Net made them, and what they keep."""

    calls: list[tuple[object, Recorded]] = field(default_factory=list)


@dataclass
class _Editing:
    recording: Recording
    mask: Tensor
    position: int = 0
    prepared: dict[object, Prepared] = field(default_factory=dict)


_session: ContextVar[Recording | _Editing | None] = ContextVar("fisedit_session", default=None)


@contextmanager
def recording() -> Iterator[Recording]:
    """Within the context, U-Nets compiled with backend ``"fisedit"`` keep what edits of their calls need."""
    with _within(Recording()) as session:
        yield session


@contextmanager
def editing(base: Recording, mask: Tensor) -> Iterator[None]:
    """Within the context, the calls of ``base`` are repeated sparsely, in their order.

    Args:
        base: from :func:`recording`. Read only; any number of edits may use it.
        mask: bool ``[n, h, w]`` at latent resolution; n divides the U-Net's batch.
    """
    with _within(_Editing(base, mask)):
        yield


@contextmanager
def _within(session: Any) -> Iterator[Any]:
    token = _session.set(session)
    try:
        yield session
    finally:
        _session.reset(token)


def fisedit(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend.

    Args:
        mode: of the dense code, as Inductor takes it: ``"reduce-overhead"`` for example.
        options: fields of :class:`~fisedit_compile.SparsityConfig`, and options of Inductor for the dense code.

    Raises:
        ValueError: an option that neither of the two has.
    """
    ours, inductors = _sort_options(options or {})
    patches = {**list_mode_options(mode), **inductors} if mode else inductors
    inductor = torch._dynamo.lookup_backend("inductor")
    dense = inductor(graph_module, list(example_inputs), **({"config_patches": patches} if patches else {}))
    return _Compiled(graph_module, example_inputs, dense, SparsityConfig.of(ours))


def _sort_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Our options and those of Inductor."""
    fields = {field.name for field in dataclasses.fields(SparsityConfig)}
    ours = {name: value for name, value in options.items() if name in fields}
    inductors = {name.replace("-", "_"): value for name, value in options.items() if name not in fields}
    if unknown := sorted(set(inductors) - set(list_options())):
        raise ValueError(
            f"unknown option(s) {', '.join(unknown)}: options are {', '.join(sorted(fields))}, and those of Inductor "
            "(torch._inductor.list_options())"
        )
    return ours, inductors


class _Compiled:
    """Sends a call to the dense code, or within a context to the record or sparse graphs, exported on first use.

    Dynamo compiles anew, into another object, for a U-Net of other attributes, and for sizes that it has to keep open.
    """

    def __init__(
        self,
        graph_module: GraphModule,
        example_inputs: Sequence[Any],
        dense: Callable[..., Any],
        config: SparsityConfig,
    ) -> None:
        self._graph_module, self._dense, self._config = graph_module, dense, config
        self._kinds = kinds_of_inputs(graph_module, example_inputs)
        self._graph: ModelGraph | None = None
        self._lock = threading.RLock()

    def __call__(self, *inputs: Any) -> Any:
        session = _session.get()
        if session is None:
            return self._dense(*inputs)
        with self._lock:
            refuse_autocast()
            graph = self._hold(inputs)
            call = bind(graph, graph.arguments(inputs), {})
            state = self._watch.look()
            program = self._programs.of(call, state)
            if isinstance(session, Recording):
                batch = call.signature.sample_shape[0]
                out, cache = program.record(call, samples=batch, activations=True, attention=False)
                cache.model = state
                session.calls.append((self, cache))
            else:
                out = self._step(program, call, inputs, state, session)
        return (out,)

    def _hold(self, inputs: Sequence[Any]) -> ModelGraph:
        if self._graph is None:
            self._graph = graph = ModelGraph(self._graph_module, self._kinds, inputs).eval()
            self._watch = ModelWatch(graph)
            self._programs = Programs(self._build)
        self._graph.hold(inputs)
        return self._graph

    def _build(self, call: Call) -> Program:
        assert self._graph is not None
        lowered = lower(self._graph, call, self._config)
        return Program(lowered, lowered.weights_of(self._graph), call.tensors[0])

    def _step(
        self, program: Program, call: Call, inputs: Sequence[Any], state: ModelState, session: _Editing
    ) -> Tensor:
        calls = session.recording.calls
        if session.position >= len(calls) or calls[session.position][0] is not self:
            raise BaseMismatchError(
                f"call {session.position + 1} of the edit has no counterpart among the {len(calls)} recorded ones: "
                "repeat the recorded calls, in their order, with inputs of the same shapes, and with a U-Net whose "
                "adapters, processors and settings are those of the recording"
            )
        cache = calls[session.position][1]
        if cache.model.difference(state):
            raise BaseMismatchError(
                "the U-Net's weights or adapters are not those that the call was recorded with: record the call again"
            )
        known = session.prepared.get(program)
        if known is None:
            known = session.prepared[program] = program.prepare(session.mask)
        session.position += 1
        if known.dense:
            return program.restore_base(self._dense(*inputs)[0], cache, known)
        return program.step(call, cache, known)
