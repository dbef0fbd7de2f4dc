"""An engine for coroutines: one thread computes, several edits at a time; whoever waits can leave."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from fisedit_compile.serving.engine import Engine
from fisedit_compile.serving.requests import Answer, Event, Job
from fisedit_compile.serving.tasks import Made, Stop, Task

#: How often a job that nobody waits for any more is told so: a pipeline forgets it at the beginning of a run.
_TELL_SECONDS = 0.02


@dataclass(frozen=True, eq=False)
class _Waiting:
    """A task, and the future of the coroutine that waits for it."""

    task: Task
    future: asyncio.Future[Answer]

    def settle(self, made: Made) -> None:
        """Give the coroutine what it waits for, from any thread."""
        with contextlib.suppress(RuntimeError):  # its loop has ended
            self.future.get_loop().call_soon_threadsafe(self._settle, made)

    def _settle(self, made: Made) -> None:
        if self.future.done():
            return
        if isinstance(made, Exception):
            self.future.set_exception(made)
        else:
            self.future.set_result(made)

    def cancel(self) -> None:
        """Say that nobody will draw it, from any thread."""
        with contextlib.suppress(RuntimeError):
            self.future.get_loop().call_soon_threadsafe(self.future.cancel)


class Worker:
    """Gives the jobs of coroutines to an engine in their order.

    When a job's turn comes, edits that wait behind it and fit to it are made with it. They overtake others by that, but
    nobody waits for more of them to come. While none waits and none is drawn, the engine's bases are written.

    Args:
        engine: the engine; the thread of this worker alone draws with it.
        batch: edits that are made together at most. Their number is a power of two, so that there are graphs for few
            sizes.
    """

    def __init__(self, engine: Engine, batch: int = 1) -> None:
        self.engine, self._batch = engine, batch
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._queue: deque[_Waiting] = deque()
        self._lock = threading.Lock()
        self._ending: set[asyncio.Task[None]] = set()

    def begin(self, prepare: Callable[[], None]) -> None:
        """Let the thread that draws prepare itself: the CUDA graphs of ``torch.compile`` are a thread's own."""
        self._thread.submit(prepare).result()

    async def draw(self, job: Job, *, progress: bool = False, partial_pictures: int = 0) -> AsyncIterator[Event]:
        """The steps of a job, where ``progress`` asks for them, and at last its answer.

        Whoever leaves the iterator, by cancelling or closing it, ends the job behind the step that it is at; one that
        is made with others ends when all of them were left.

        Raises:
            FiseditError, ValueError: see :meth:`~fisedit_compile.serving.engine.Engine.draw`.
        """
        loop, stop, events = asyncio.get_running_loop(), Stop(), asyncio.Queue[Event | None]()

        def watch(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        future: asyncio.Future[Answer] = loop.create_future()
        future.add_done_callback(lambda _: events.put_nowait(None))
        task = Task(job, stop, watch if progress else None, partial_pictures)
        with self._lock:
            self._queue.append(_Waiting(task, future))
            self.engine.bases.quiet.clear()
        self._thread.submit(self._draw_next)
        try:
            while (event := await events.get()) is not None:
                yield event
            yield await future
        finally:
            if not future.done():
                ending = asyncio.create_task(self._end(future, stop))
                self._ending.add(ending)
                ending.add_done_callback(self._ending.discard)

    def close(self) -> None:
        """Wait for the job that runs, and until its picture and all bases are written."""
        self._thread.shutdown(cancel_futures=True)
        for waiting in self._queue:
            waiting.cancel()
        self.engine.bases.quiet.set()
        self.engine.close()

    def _draw_next(self) -> None:
        """Draw what waits longest, and what fits to it; nothing, where that was drawn with others."""
        with self._lock:
            if not self._queue:
                return
            first = self._queue.popleft()
        left = {first.task: first}
        try:
            left |= {other.task: other for other in self._beside(first.task.job)}
            self.engine.draw_together(tuple(left), lambda task, made: left.pop(task).settle(made))
        except Exception as error:
            self.engine.settle()  # those that are drawn have their answers
            for waiting in left.values():
                waiting.settle(error)
        finally:
            with self._lock:
                if not self._queue:
                    self.engine.bases.quiet.set()

    def _beside(self, job: Job) -> list[_Waiting]:
        """What is made together with a job, of what waits behind it; it waits no more."""
        together = self.engine.changes.together(job) if self._batch > 1 else None
        if together is None:
            return []
        with self._lock:
            others = tuple(self._queue)
        fitting = (other for other in others if other.task.job.id != job.id and self._fits(other.task, together))
        taken = list(islice(fitting, self._batch - 1))
        count = 1 << (1 + len(taken)).bit_length() - 1
        del taken[count - 1 :]
        with self._lock:
            for waiting in taken:
                self._queue.remove(waiting)
        return taken

    def _fits(self, task: Task, together: Hashable) -> bool:
        """Whether a job can be made with another, which would not have to wait for its base."""
        changes, job = self.engine.changes, task.job
        return not task.stop.asked.is_set() and changes.has_base_of(job) and changes.together(job) == together

    async def _end(self, future: asyncio.Future[Answer], stop: Stop) -> None:
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else asks for it
        while not future.done():
            self.engine.interrupt(stop)
            await asyncio.sleep(_TELL_SECONDS)
