"""The torch.compile backend ``"fisedit"``: the same passes for those who compile their U-Net anyway.

    unet = torch.compile(pipe.unet, backend="fisedit")
    with fisedit_compile.backend.recording() as base:
        unet(sample, timestep, text)                # dense; what edits need goes to ``base``
    with fisedit_compile.backend.editing(base, mask):
        unet(sample, timestep, new_text)            # sparse: only the mask is computed anew

Outside both contexts the compiled U-Net is what ``inductor`` makes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fisedit_compile.cache.step_cache import StepCache
from fisedit_compile.compiler.lowered import lower
from fisedit_compile.config import SparsityConfig
from fisedit_compile.errors import BaseMismatchError, CaptureError
from fisedit_compile.ir.call import Call, bind
from fisedit_compile.runtime.prepared import Prepared
from fisedit_compile.runtime.program import Program


@dataclass
class Recording:
    """The calls that ran within :func:`recording`, in order: which compiled U-Net made them, and what they keep."""

    calls: list[tuple[object, StepCache]] = field(default_factory=list)


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
    graph_module: GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend. ``options`` are fields of :class:`~fisedit_compile.SparsityConfig`."""
    config = SparsityConfig.of(options)
    inductor = torch._dynamo.lookup_backend("inductor")
    return _Compiled(graph_module, inductor(graph_module, list(example_inputs)), config)


class _Compiled:
    """Sends a call to the dense code, or within a context to the record or sparse graphs, captured on first use."""

    def __init__(self, graph_module: GraphModule, dense: Callable[..., Any], config: SparsityConfig) -> None:
        self._graph_module, self._dense, self._config = graph_module, dense, config
        self._unlifted: _Unlifted | None = None
        self._program: Program | None = None

    def __call__(self, *inputs: Any) -> Any:
        session = _session.get()
        if session is None:
            return self._dense(*inputs)
        if self._unlifted is None:
            self._unlifted = _Unlifted(self._graph_module, inputs).eval()
        call = bind(self._unlifted, self._unlifted.arguments(inputs), {})
        if self._program is None:
            self._program = Program(lower(self._unlifted, call, self._config), call)
        if isinstance(session, Recording):
            batch = call.signature.sample_shape[0]
            out, cache = self._program.record(call, samples=batch, activations=True, attention=False)
            session.calls.append((self, cache))
        else:
            out = self._step(self._program, call, session)
        return (out,)

    def _step(self, program: Program, call: Call, session: _Editing) -> Tensor:
        calls = session.recording.calls
        if session.position >= len(calls) or calls[session.position][0] is not self:
            raise BaseMismatchError(
                f"call {session.position + 1} of the edit has no counterpart among the {len(calls)} recorded ones: "
                "repeat the recorded calls, in their order, with inputs of the same shapes"
            )
        if self not in session.prepared:
            session.prepared[self] = program.prepare(session.mask)
        cache = calls[session.position][1]
        session.position += 1
        return program.step(call, cache, session.prepared[self])


class _Unlifted(torch.nn.Module):
    """Dynamo's graph with the parameters that it takes as inputs back in place, so that it takes a user's tensors.

    Raises:
        CaptureError: the graph is only a part of a U-Net.
    """

    def __init__(self, graph_module: GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__()
        (outputs,) = graph_module.graph.output_node().args
        self._user = [i for i, value in enumerate(inputs) if not isinstance(value, torch.nn.Parameter)]
        shapes = [tuple(inputs[i].shape) for i in self._user if isinstance(inputs[i], Tensor)]
        if not isinstance(outputs, tuple) or len(outputs) != 1 or not shapes or len(shapes[0]) != 4:
            raise CaptureError(
                "backend 'fisedit' was given a part of a U-Net, not the whole: compile the U-Net itself, with "
                "fullgraph=True to see what breaks the graph"
            )
        self._graph_module = graph_module
        self._weights = torch.nn.ParameterList(value for value in inputs if isinstance(value, torch.nn.Parameter))

    def arguments(self, inputs: Sequence[Any]) -> tuple[Tensor, tuple[Any, ...]]:
        """The user's tensors among the inputs of the compiled graph: the sample, and the rest."""
        sample, *rest = (inputs[i] for i in self._user)
        return sample, tuple(rest)

    def forward(self, sample: Tensor, rest: tuple[Any, ...]) -> Any:
        user, weights = iter((sample, *rest)), iter(self._weights)
        count = len(self._weights) + len(self._user)
        places = set(self._user)
        return self._graph_module(*(next(user) if i in places else next(weights) for i in range(count)))
