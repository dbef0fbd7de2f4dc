"""CUDA graphs: how one is captured, and a dense stage that runs as one.

Hundreds of kernels take longer to launch one by one than to run; a graph launches them together, but always for the
same shapes and addresses. So what a graph reads is copied to where it was when the graph was captured, and what it
leaves is copied away.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fisedit_compile.kernels.launch.semaphores import new_semaphores, use_semaphores
from fisedit_compile.kernels.launch.triton_launch import compiling_alone
from fisedit_compile.runtime.stage import Stage

_Out = TypeVar("_Out")

#: One thread captures at a time: a capture begins by emptying the allocator's cache, which all of them share.
_capturing = threading.Lock()


class GraphCapturer:
    """Captures CUDA graphs that share their memory, because one of them runs at a time.

    On other devices than CUDA nothing is captured, and what would be replayed is run.

    Attributes:
        captures: how many graphs were captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.captures = 0
        self._cuda = device.type == "cuda"
        self._turn = threading.RLock()
        self._done: torch.cuda.Event | None = None
        self._done_on: torch.cuda.Stream | None = None
        if self._cuda:
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()
            self._semaphores = new_semaphores(device)

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """One run after the other, whatever threads and streams they are on; on the current stream of the device.

        Where a run fails, the next one waits for what it had launched, and finds its buffers to itself as ever. Buffers
        that are made inside outlive the caller's inference mode, in which they could not be written to later.
        """
        with self._turn, torch.inference_mode(False), torch.no_grad():
            if not self._cuda:
                yield
                return
            with torch.cuda.device(self.device):
                stream = torch.cuda.current_stream()
                if self._done is not None and self._done_on != stream:
                    stream.wait_event(self._done)
                try:
                    yield
                finally:
                    self._done = self._done or torch.cuda.Event()
                    self._done.record(stream)
                    self._done_on = stream

    def capture(self, run: Callable[[], _Out]) -> Callable[[], _Out]:
        """Capture ``run`` and return its replay, whose outputs the next one overwrites. Call both :meth:`in_turn`.

        ``run`` runs twice before, because Triton must not compile during a capture.
        """
        if not self._cuda:
            return run
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream), use_semaphores(self._semaphores):
            with compiling_alone():
                run()
            run()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads do meanwhile, such as allocating memory, does not disturb the capture.
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with _capturing, use_semaphores(self._semaphores), capture:
            out = run()
        self.captures += 1

        def replay() -> _Out:
            graph.replay()
            return out

        return replay


class StaticStage:
    """A stage that runs as one CUDA graph, captured at its first call with tensors of the same shapes.

    Args:
        stage: reads tensors alone; those on the host are copied to the device.
        capturer: of the device that the stage runs on.
        fixed: values that stay where they are from call to call, such as weights: they are read there.
    """

    def __init__(self, stage: Stage, capturer: GraphCapturer, fixed: Mapping[Any, Tensor] | None = None) -> None:
        self._stage, self._capturer, self._fixed = stage, capturer, fixed or {}
        self._names = [name for name in stage.names if name not in self._fixed]
        self._captured: dict[object, tuple[list[Tensor], Callable[[], Any]]] = {}

    def __call__(self, values: Mapping[Any, Tensor], own: Callable[[Any], Any] | None = None) -> Any:
        """What the stage returns, in memory of its own.

        Args:
            values: what it reads, by name.
            own: takes what is wanted of it to memory of its own; whatever else lies there the next run overwrites. None
                copies all.
        """
        given = [values[name] for name in self._names]
        shapes = tuple((each.shape, each.dtype) for each in given)
        with self._capturer.in_turn():
            if shapes not in self._captured:
                self._captured[shapes] = self._capture(given)
            inputs, replay = self._captured[shapes]
            torch._foreach_copy_(inputs, given)
            return (own or copied)(replay())

    def forget(self) -> None:
        """Capture anew at the next call, because a graph reads the weights where they were."""
        self._captured.clear()

    def _capture(self, given: list[Tensor]) -> tuple[list[Tensor], Callable[[], Any]]:
        """What the graph reads, filled with what is given now, and the graph."""
        inputs = [each.to(self._capturer.device, copy=True) for each in given]
        values = {**self._fixed, **dict(zip(self._names, inputs, strict=True))}
        return inputs, self._capturer.capture(lambda: self._stage(values))


def copied(values: _Out) -> _Out:
    """The same nested tensors in memory of their own: one launch for all whole ones of a dtype, and one a piece."""
    tensors, tree = pytree.tree_flatten(values)
    copies = [torch.empty_like(each) for each in tensors]
    for whole in (True, False):  # torch copies a list that has a piece of a larger tensor in it one by one
        pairs = [pair for pair in zip(copies, tensors, strict=True) if (pair[0].stride() == pair[1].stride()) is whole]
        if pairs:
            torch._foreach_copy_([copy for copy, _ in pairs], [each for _, each in pairs])
    result: _Out = pytree.tree_unflatten(copies, tree)
    return result
