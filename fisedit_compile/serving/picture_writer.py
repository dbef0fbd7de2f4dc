"""Writes pictures down in a thread of its own, so that whoever draws goes on with the next one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from fisedit_compile.serving.drawn import Drawn
from fisedit_compile.serving.held_bases import HeldBases
from fisedit_compile.serving.library import Library
from fisedit_compile.serving.recall import Recall
from fisedit_compile.serving.requests import Answer, Job
from fisedit_compile.serving.tasks import Made, Task


class PictureWriter:
    """Makes a file of each picture, adds it to the library, and tells whoever waits for it.

    Args:
        bases, recall, library: of the engine.
        pipeline: digest of the pipeline that draws.
    """

    def __init__(self, bases: HeldBases, recall: Recall, library: Library, pipeline: str) -> None:
        self._bases, self._recall, self._library, self._pipeline = bases, recall, library, pipeline
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="write-pictures")

    def write(self, task: Task, drawn: Drawn, seconds: float, done: Callable[[Task, Made], None]) -> None:
        """Write a picture down in the background.

        What its edits need is in memory when this returns, so that it is found by whoever finds the picture in the
        library.

        Args:
            task: that it was drawn for.
            drawn: the picture.
            seconds: that it took.
            done: called by the thread that writes, with the answer or the error.
        """
        name = task.job.id
        if drawn.base is not None:
            self._bases.hold(name, drawn.base)
        elif drawn.edit is not None:
            self._recall.keep_edit(name, drawn.edit)
        self._thread.submit(self._write, task, drawn, seconds, done)

    def wait(self) -> None:
        """Wait until the pictures that were given so far are written, and whoever waits for them was told."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Wait until all are written."""
        self._thread.shutdown()

    def _write(self, task: Task, drawn: Drawn, seconds: float, done: Callable[[Task, Made], None]) -> None:
        try:
            made: Made = self._written(task.job, drawn, seconds)
        except Exception as error:
            self._bases.drop(task.job.id)
            self._recall.let_go_of_edit(task.job.id)
            made = error
        done(task, made)

    def _written(self, job: Job, drawn: Drawn, seconds: float) -> Answer:
        usual = self._library.seconds_of_new(drawn.settings.key(self._pipeline))
        picture = drawn.picture(job, self._pipeline, seconds, usual)
        self._library.add(picture)
        if drawn.base is not None:
            self._bases.write(job.id, drawn.base)  # one without a picture would be removed from the store
        return picture.answer()
