"""An engine for coroutines: one thread computes, whoever waits can leave."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from fisedit_compile.serving.engine import Engine, Stop
from fisedit_compile.serving.requests import Answer, Event, Job

#: How often a job that nobody waits for any more is told so: a pipeline forgets it at the beginning of a run.
_TELL_SECONDS = 0.02


class Worker:
    """Gives the jobs of coroutines to an engine, one after the other.

    Args:
        engine: the engine; the thread of this worker alone draws with it.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._ending: set[asyncio.Task[None]] = set()

    async def draw(self, job: Job, *, progress: bool = False, partial_pictures: int = 0) -> AsyncIterator[Event]:
        """The steps of a job, where ``progress`` asks for them, and at last its answer.

        Whoever leaves the iterator, by cancelling or closing it, ends the job behind the step that it is at.

        Raises:
            FiseditError, ValueError: see :meth:`~fisedit_compile.serving.engine.Engine.draw`.
        """
        loop, stop, events = asyncio.get_running_loop(), Stop(), asyncio.Queue[Event | None]()
        draw = functools.partial(self.engine.draw, job, stop=stop, partial_pictures=partial_pictures)
        if progress:
            draw = functools.partial(draw, watch=lambda event: loop.call_soon_threadsafe(events.put_nowait, event))
        future = loop.run_in_executor(self._thread, draw)
        future.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (event := await events.get()) is not None:
                yield event
            yield await future
        finally:
            if not future.done():
                task = asyncio.create_task(self._end(future, stop))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)

    def close(self) -> None:
        """Wait for the job that runs, and until all bases are written."""
        self._thread.shutdown(cancel_futures=True)
        self.engine.bases.close()

    async def _end(self, future: asyncio.Future[Answer], stop: Stop) -> None:
        future.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody else asks for it
        while not future.done():
            self.engine.interrupt(stop)
            await asyncio.sleep(_TELL_SECONDS)
