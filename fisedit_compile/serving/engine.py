"""The engine: computes pictures, from stored ones where it can."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from fisedit_compile.errors import BaseMemoryError, FiseditError, MaskError, PipelineInterruptedError
from fisedit_compile.serving.artist import Artist
from fisedit_compile.serving.errors import OtherPipelineError, PictureGoneError, WithheldPictureError
from fisedit_compile.serving.held_bases import HeldBases
from fisedit_compile.serving.library import Library
from fisedit_compile.serving.partial_pictures import StepWatch
from fisedit_compile.serving.picture import BasePlace, Picture
from fisedit_compile.serving.picture_files import as_png, of_png, pixels_digest
from fisedit_compile.serving.recall import Recall
from fisedit_compile.serving.requests import (
    Answer,
    EditRequest,
    GenerationRequest,
    Job,
    PhotoRequest,
    Progress,
    Reuse,
    Settings,
)

if TYPE_CHECKING:
    from fisedit_compile.editing.base import Base
    from fisedit_compile.editing.edit_request import EditRequest as AskedEdit
    from fisedit_compile.editing.editor import Editor
    from fisedit_compile.editing.result import Edit

logger = logging.getLogger(__name__)


@dataclass
class Stop:
    """Ends the job that it was given with, from any thread, once or for good; see :meth:`Engine.interrupt`."""

    asked: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, eq=False)
class Task:
    """A job, and what whoever waits for it wants to know.

    Attributes:
        job: what to compute.
        stop: ends the computation.
        watch: called at the end of each step, from the thread that computes.
        partial_pictures: how many of these calls bring the picture as it is then.
    """

    job: Job
    stop: Stop = field(default_factory=Stop)
    watch: Callable[[Progress], None] | None = None
    partial_pictures: int = 0

    @property
    def steps(self) -> StepWatch | None:
        """What tells of its steps."""
        return StepWatch(self.watch, self.partial_pictures) if self.watch else None


#: What comes of a task: an answer, or the error for whoever waits.
Made = Answer | Exception

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Drawn:
    """What a job comes to, before it is written down."""

    kind: str
    image: Any
    settings: Settings
    seed: int
    reuse: Reuse
    base: Base | None = None
    edit: Edit | None = None
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Change:
    """What a job makes of which picture.

    Attributes:
        record: the picture.
        asked: of the editor.
        settings: of the new picture.
    """

    record: Picture
    asked: AskedEdit
    settings: Settings

    def drawn(self, task: Task, edit: Edit) -> _Drawn:
        """What the edit comes to."""
        chosen = task.job.similar
        reuse = Reuse("edit", self.record.id, chosen.similarity if chosen else None, edit.report.mask_area)
        kind, seed = ("reused" if chosen else "edit"), self.record.seed
        return _Drawn(kind, edit.image, self.settings, seed, reuse, edit=edit, report=_report(edit, task))


class Engine:
    """Draws pictures with one editor, one after the other or several edits together, and keeps their bases.

    Args:
        editor: the editor; nobody else may change its pipeline.
        bases: of its pictures.
        library: the pictures.
    """

    def __init__(self, editor: Editor, bases: HeldBases, library: Library) -> None:
        self.editor, self.bases, self.library = editor, bases, library
        self.pipeline = editor.digest()
        self.artist = Artist(editor)
        self.recall = Recall(editor, self.artist, bases, library, self.pipeline)
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
        made: list[Made] = []
        self.draw_together([Task(job, stop or Stop())], lambda _, each: made.append(each))
        if isinstance(made[0], Exception):
            raise made[0]
        return made[0]

    def draw_together(self, tasks: Sequence[Task], done: Callable[[Task, Made], None]) -> None:
        """Compute several pictures; the edits among them in one run, where the editor can.

        Args:
            tasks: what to compute, and who waits for it.
            done: called with each task as soon as it has an answer, or the error that :meth:`draw` raises.
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

    def together(self, job: Job) -> Hashable | None:
        """What jobs have in common whose edits can be made together; None of one that is drawn alone.

        Masks are all given or all found: else their first steps would be two batches.
        """
        request = job.request
        if isinstance(request, EditRequest):
            record = self.library.get(request.base)
            if record is None:
                return None
            guidance = record.settings.guidance if request.guidance is None else request.guidance
            return record.settings.width, record.settings.height, record.settings.steps, guidance, request.mask is None
        if isinstance(request, GenerationRequest) and job.similar is not None:
            wanted = request.settings
            return wanted.width, wanted.height, wanted.steps, wanted.guidance, True
        return None

    def has_base_of(self, job: Job) -> bool:
        """Whether the base that a job changes is in memory, so that whoever is drawn beside it need not wait for it."""
        name = job.changes
        return name is not None and self.bases.holds(name)

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
            made: Made = self._write_down(task.job, drawn, before + time.perf_counter() - start)
        except Exception as error:
            made = error
        done(task, made)

    def _make_edits(self, tasks: Sequence[Task], done: Callable[[Task, Made], None]) -> None:
        """Change pictures. What was to be changed without being asked for, and cannot be, is drawn anew."""
        start = time.perf_counter()
        try:
            with self._stoppable(tasks):
                results = self._with_room(lambda: self._changed(tasks))
        except Exception as error:
            if len(tasks) > 1 and not isinstance(error, PipelineInterruptedError):
                logger.info("%d edits are made one by one: %s", len(tasks), error)
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
            elif isinstance(result, _Drawn):
                done(task, self._written(task.job, result, seconds))
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

    def _new(self, task: Task, why: str) -> _Drawn:
        job, request = task.job, task.job.request
        if isinstance(request, PhotoRequest):
            photo = of_png(request.photo)
            settings = Settings(photo.width, photo.height, request.steps, request.guidance)
            base = self.artist.invert(request.photo, request.prompt, settings)
            return _Drawn("photo", base.image, settings, 0, Reuse("none"), base=base)
        assert isinstance(request, GenerationRequest)
        base = self.artist.new_picture(request.prompt, request.settings, job.seed, task.steps)
        return _Drawn("new", base.image, request.settings, job.seed, Reuse("none", why=why), base=base)

    def _changed(self, tasks: Sequence[Task]) -> dict[Task, _Drawn | Exception]:
        """What edits come to, or why each of them cannot be made."""
        results: dict[Task, _Drawn | Exception] = {}
        changes: dict[Task, _Change] = {}
        for task in tasks:
            try:
                changes[task] = self._change(task)
            except (BaseMemoryError, PipelineInterruptedError):
                raise
            except (FiseditError, ValueError) as error:
                results[task] = error
        if changes:
            asked = [change.asked for change in changes.values()]
            edits = self.editor.edit_many(asked, return_exceptions=True)
            for (task, change), edit in zip(changes.items(), edits, strict=True):
                results[task] = edit if isinstance(edit, Exception) else change.drawn(task, edit)
        return results

    def _change(self, task: Task) -> _Change:
        """What a job makes of which picture.

        Raises:
            PictureGoneError: the picture is not there; or its base is in neither memory nor store, and drawing it again
                would take longer than the new picture that was asked for.
        """
        job, request = task.job, task.job.request
        if isinstance(request, EditRequest):
            record = self.recall.record(request.base)
            base = self.recall.base_of(record)
            settings = record.settings
            if request.guidance is not None:
                settings = replace(settings, guidance=request.guidance)
            if request.negative_prompt is not None:
                settings = replace(settings, negative_prompt=request.negative_prompt)
            given = (base, request.prompt, request.mask, record.settings, settings, task.steps)
            return _Change(record, self.artist.request(*given), settings)
        assert isinstance(request, GenerationRequest)
        assert job.similar is not None
        found = self.library.get(job.similar.base)
        held = None if found is None else self.recall.at_hand(found)
        if found is None or held is None:
            self.library.note_base(job.similar.base, BasePlace.NOWHERE)
            raise PictureGoneError("the base of the similar picture is not there any more")
        largest = self.editor.config.dense_above
        same = (found.settings, found.settings)
        asked = self.artist.request(held, request.prompt, None, *same, task.steps, largest_mask=largest)
        return _Change(found, asked, found.settings)

    def _written(self, job: Job, drawn: _Drawn, seconds: float) -> Made:
        try:
            return self._write_down(job, drawn, seconds)
        except Exception as error:
            return error

    def _write_down(self, job: Job, drawn: _Drawn, seconds: float) -> Answer:
        flags = (drawn.base or drawn.edit).nsfw  # type: ignore[union-attr]
        if flags and any(flags):
            raise WithheldPictureError("the safety checker withheld the picture: try other words")
        key = drawn.settings.key(self.pipeline)
        usual = self.library.seconds_of_new(key)
        saved = usual - seconds if usual is not None and drawn.edit is not None else None
        request = job.request
        picture = Picture(
            id=job.id,
            kind=drawn.kind,
            prompt=request.prompt,
            key=key,
            pipeline=self.pipeline,
            route=job.route,
            settings=drawn.settings,
            seed=drawn.seed,
            parent=drawn.reuse.base,
            mask=request.mask if isinstance(request, EditRequest) else None,
            embedding=job.embedding,
            encoder=job.encoder,
            png=as_png(drawn.image),
            pixels=pixels_digest(drawn.image),
            seconds=seconds,
            reuse=vars(drawn.reuse) | {"seconds_saved": saved},
            report=drawn.report,
            base=_place(drawn),
        )
        self.library.add(picture)
        if drawn.base is not None:
            self.bases.add(job.id, drawn.base)
        elif drawn.edit is not None:
            self.recall.keep_edit(job.id, drawn.edit)
        return picture.answer()


def _place(drawn: _Drawn) -> BasePlace:
    """Where the base of a picture is; one of an edit that visited every step takes as long as a new picture."""
    if drawn.edit is None:
        return BasePlace.HELD
    visits_all = len(drawn.edit.trajectory.visits) == drawn.edit.trajectory.steps
    return BasePlace.NOWHERE if visits_all else BasePlace.EDIT


def _report(edit: Edit, task: Task) -> dict[str, Any]:
    """What an answer says of an edit; its multiply-accumulates, which take a plan to count, for those who watch."""
    report = edit.report
    return {
        "mask_source": report.mask_source,
        "removed_words": list(report.removed_words[0]),
        "added_words": list(report.added_words[0]),
        "dense_steps": report.dense_steps,
        "sparse_steps": report.sparse_steps,
        "ran_dense": report.ran_dense,
        "seconds": report.seconds,
        "made_together": report.made_together,
        **({"macs_ratio": report.macs["ratio"]} if task.watch else {}),
    }
