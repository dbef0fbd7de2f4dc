"""The engine: computes pictures, from stored ones where it can."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from fisedit_compile.errors import BaseMemoryError, MaskError, PipelineInterruptedError
from fisedit_compile.serving.artist import Artist
from fisedit_compile.serving.changes import Changes
from fisedit_compile.serving.drawn import Drawn
from fisedit_compile.serving.errors import OtherPipelineError, PictureGoneError
from fisedit_compile.serving.held_bases import HeldBases
from fisedit_compile.serving.library import Library
from fisedit_compile.serving.picture_files import of_png
from fisedit_compile.serving.picture_writer import PictureWriter
from fisedit_compile.serving.recall import Recall
from fisedit_compile.serving.requests import Answer, GenerationRequest, Job, PhotoRequest, Reuse, Settings
from fisedit_compile.serving.tasks import Made, Stop, Task

if TYPE_CHECKING:
    from fisedit_compile.editing.editor import Editor

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class Engine:
    """Draws pictures with one editor, one after the other or several edits together, and keeps their bases.

    Args:
        editor: the editor; nobody else may change its pipeline.
        bases: of its pictures.
        library: the pictures.
        records: whether new pictures are drawn with their bases; if not, by the pipeline as it is. One that is edited
            all the same is drawn again for it.
    """

    def __init__(self, editor: Editor, bases: HeldBases, library: Library, *, records: bool = True) -> None:
        self.editor, self.bases, self.library, self._records = editor, bases, library, records
        self.pipeline = editor.digest()
        self.artist = Artist(editor)
        self.recall = Recall(editor, self.artist, bases, library, self.pipeline)
        self.changes = Changes(editor, self.artist, bases, library, self.recall)
        self._pictures = PictureWriter(bases, self.recall, library, self.pipeline)
        self._turn, self._running_lock = threading.Lock(), threading.Lock()
        self._running: list[Stop] = []

    def draw(self, job: Job, *, stop: Stop | None = None) -> Answer:
        """Compute a picture and write it down; one whose name is there already is the answer.

        Args:
            job: what to compute.
            stop: ends the computation.

        Raises:
            PipelineInterruptedError: it was stopped.
            PictureGoneError: the picture to be changed is not there.
            WithheldPictureError: the safety checker blackened it.
            OtherPipelineError: the job is for another pipeline.
            FiseditError, ValueError: the editor refuses it: no mask is found, the mask is of no pixels, a size or a
                number of steps that the pipeline does not take.
        """
        future: Future[Made] = Future()
        self.draw_together([Task(job, stop or Stop())], lambda _, made: future.set_result(made))
        if isinstance(made := future.result(), Exception):
            raise made
        return made

    def draw_together(self, tasks: Sequence[Task], done: Callable[[Task, Made], None]) -> None:
        """Compute several pictures; the edits among them in one run, where the editor can.

        They are written down in the background, and may be so still when this returns.

        Args:
            tasks: what to compute, and who waits for it.
            done: called with each task as soon as it has an answer, or the error that :meth:`draw` raises; from this
                thread or another.
        """
        with self._turn:
            edits = []
            for task in tasks:
                if (known := self._known(task)) is not None:
                    done(task, known)
                elif task.job.changes:
                    edits.append(task)
                else:
                    self._draw_new(task, done, task.job.why_new)
            if edits:
                self._make_edits(edits, done)

    def interrupt(self, stop: Stop) -> None:
        """Let the job that was given ``stop`` end behind the step that it is at, if it is the one that runs.

        Jobs that run together end when each of them was stopped; until then nothing is kept of those that were.
        """
        stop.asked.set()
        with self._running_lock:
            if any(each is stop for each in self._running) and all(each.asked.is_set() for each in self._running):
                self.editor.pipe._interrupt = True

    @contextmanager
    def _stoppable(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Within the context jobs run, and their stops are obeyed."""
        with self._running_lock:
            self._running = [task.stop for task in tasks]
        try:
            if all(task.stop.asked.is_set() for task in tasks):
                raise PipelineInterruptedError("stopped before it began")
            yield
        finally:
            with self._running_lock:  # nobody sets it behind this, so that the next job is not stopped
                self._running, self.editor.pipe._interrupt = [], False

    def settle(self) -> None:
        """Wait until the pictures that were drawn so far are written, and whoever waits for them was told."""
        self._pictures.wait()

    def close(self) -> None:
        """Wait until all pictures are written, and the bases whose turn it is."""
        self._pictures.close()
        self.bases.close()

    def _known(self, task: Task) -> Made | None:
        """The answer to a job that was drawn by a process that was killed behind this; or why it cannot be drawn."""
        if task.job.pipeline != self.pipeline:
            return OtherPipelineError("the model or its options have changed since the service started: start it again")
        known = self.library.get(task.job.id)
        return None if known is None else known.answer()

    def _draw_new(self, task: Task, done: Callable[[Task, Made], None], why: str, before: float = 0.0) -> None:
        """Draw a picture that changes none; ``before`` is the time that was lost in trying to."""
        start = time.perf_counter()
        try:
            with self._stoppable([task]):
                drawn = self._with_room(lambda: self._new(task, why))
        except Exception as error:
            done(task, error)
        else:
            self._pictures.write(task, drawn, before + time.perf_counter() - start, done)

    def _make_edits(self, tasks: Sequence[Task], done: Callable[[Task, Made], None]) -> None:
        """Change pictures. What was to be changed without being asked for, and cannot be, is drawn anew."""
        start = time.perf_counter()
        try:
            with self._stoppable(tasks):
                results = self._with_room(lambda: self.changes.make(tasks))
        except Exception as error:
            if len(tasks) > 1 and not isinstance(error, PipelineInterruptedError):
                logger.warning("%d edits are made one by one: %s", len(tasks), error)
                for task in tasks:
                    self._make_edits([task], done)
                return
            results = dict.fromkeys(tasks, error)
        seconds = time.perf_counter() - start
        anew: list[tuple[Task, str]] = []
        for task, result in results.items():
            chosen = isinstance(task.job.request, GenerationRequest)
            if task.stop.asked.is_set():
                done(task, PipelineInterruptedError("stopped"))
            elif isinstance(result, Drawn):
                self._pictures.write(task, result, seconds, done)
            elif chosen and isinstance(result, (MaskError, PictureGoneError, ValueError)):
                anew.append((task, str(result)))
            else:
                done(task, result)
        for task, why in anew:
            logger.info("%s is drawn anew: %s", task.job.id, why)
            self._draw_new(task, done, why, seconds)

    def _with_room(self, draw: Callable[[], _T]) -> _T:
        """What ``draw`` returns, without bases in memory where it finds no room beside them."""
        try:
            return draw()
        except BaseMemoryError:
            if not self.bases.nbytes:
                raise
            self.bases.drop()  # they can be loaded again
            return draw()

    def _new(self, task: Task, why: str) -> Drawn:
        job, request = task.job, task.job.request
        if isinstance(request, PhotoRequest):
            photo = of_png(request.photo)
            settings = Settings(photo.width, photo.height, request.steps, request.guidance)
            base = self.artist.invert(request.photo, request.prompt, settings)
            return Drawn("photo", base.image, settings, 0, Reuse("none"), base.nsfw, base=base)
        assert isinstance(request, GenerationRequest)
        asked, reuse = (request.prompt, request.settings, job.seed, task.steps), Reuse("none", why=why)
        if not self._records:
            image, flags = self.artist.unrecorded(*asked)
            return Drawn("new", image, request.settings, job.seed, reuse, flags, report={"recorded": False})
        base = self.artist.new_picture(*asked)
        return Drawn("new", base.image, request.settings, job.seed, reuse, base.nsfw, base=base)
