"""The engine: computes pictures, from stored ones where it can."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fisedit_compile.errors import BaseMemoryError, MaskError, PipelineInterruptedError
from fisedit_compile.serving.artist import Artist, step_callback
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
    from fisedit_compile.editing.editor import Editor
    from fisedit_compile.editing.result import Edit

logger = logging.getLogger(__name__)


@dataclass
class Stop:
    """Ends the job that it was given with, from any thread, once or for good; see :meth:`Engine.draw`."""

    asked: threading.Event = field(default_factory=threading.Event)


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


class Engine:
    """Draws pictures with one editor, one after the other, and keeps their bases.

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
        self._running: Stop | None = None

    def draw(
        self,
        job: Job,
        *,
        stop: Stop | None = None,
        watch: Callable[[Progress], None] | None = None,
        partial_pictures: int = 0,
    ) -> Answer:
        """Compute a picture and write it down; one whose name is there already is the answer.

        Args:
            job: what to compute.
            stop: ends the computation.
            watch: called at the end of each step, from the thread that computes.
            partial_pictures: how many of these calls bring the picture as it is then.

        Raises:
            PipelineInterruptedError: it was stopped.
            PictureGoneError: the picture to be changed is not there.
            WithheldPictureError: the safety checker blackened it.
            OtherPipelineError: the job is for another pipeline.
            FiseditError, ValueError: the editor refuses it: no mask is found, the mask is of no pixels, a size or a
                number of steps that the pipeline does not take.
        """
        stop = stop or Stop()
        if job.pipeline != self.pipeline:
            raise OtherPipelineError("the model or its options have changed since the service started: start it again")
        with self._turn:
            if (known := self.library.get(job.id)) is not None:  # by a process that was killed behind this
                return known.answer()
            start = time.perf_counter()
            with self._stoppable(stop):
                steps = StepWatch(watch, partial_pictures) if watch else None
                try:
                    drawn = self._draw(job, steps)
                except BaseMemoryError:
                    if not self.bases.nbytes:
                        raise
                    self.bases.drop()  # they can be loaded again
                    drawn = self._draw(job, steps)
            return self._write_down(job, drawn, time.perf_counter() - start)

    def interrupt(self, stop: Stop) -> None:
        """Let the job that was given ``stop`` end behind the step that it is at, if it is the one that runs."""
        stop.asked.set()
        with self._running_lock:
            if self._running is stop:
                self.editor.pipe._interrupt = True

    @contextmanager
    def _stoppable(self, stop: Stop) -> Iterator[None]:
        """Within the context a job runs, and its stop is obeyed."""
        with self._running_lock:
            self._running = stop
        try:
            if stop.asked.is_set():
                raise PipelineInterruptedError("stopped before it began")
            yield
        finally:
            with self._running_lock:  # nobody sets it behind this, so that the next job is not stopped
                self._running, self.editor.pipe._interrupt = None, False

    def _draw(self, job: Job, steps: StepWatch | None) -> _Drawn:
        request = job.request
        if isinstance(request, PhotoRequest):
            return self._invert(request)
        if isinstance(request, EditRequest):
            return self._edit(job, request, steps)
        why = job.why_new
        if job.similar is not None:
            try:
                return self._change_similar(job, request, steps)
            except PipelineInterruptedError:
                raise
            except (MaskError, PictureGoneError, ValueError) as error:
                why = str(error)
                logger.info("%s is drawn anew: %s", job.id, why)
        return self._generate(job, request, steps, why)

    def _generate(self, job: Job, request: GenerationRequest, steps: StepWatch | None, why: str) -> _Drawn:
        base = self.artist.new_picture(request.prompt, request.settings, job.seed, steps)
        return _Drawn("new", base.image, request.settings, job.seed, Reuse("none", why=why), base=base)

    def _invert(self, request: PhotoRequest) -> _Drawn:
        photo = of_png(request.photo)
        settings = Settings(photo.width, photo.height, request.steps, request.guidance)
        base = self.artist.invert(request.photo, request.prompt, settings)
        return _Drawn("photo", base.image, settings, 0, Reuse("none"), base=base)

    def _change_similar(self, job: Job, request: GenerationRequest, steps: StepWatch | None) -> _Drawn:
        """An edit of a picture that the service chose, within the mask that is found.

        Raises:
            MaskError: none is found, or one that is so large that the edit would run dense.
            PictureGoneError: its base is in neither memory nor store: drawing it again would take longer.
        """
        assert job.similar is not None
        record = self.library.get(job.similar.base)
        base = None if record is None else self.recall.at_hand(record)
        if record is None or base is None:
            self.library.note_base(job.similar.base, BasePlace.NOWHERE)
            raise PictureGoneError("the base of the similar picture is not there any more")
        edit = self.editor.edit(
            base, request.prompt, largest_mask=self.editor.config.dense_above, **step_callback(steps, len(base.visits))
        )
        reuse = Reuse("edit", record.id, job.similar.similarity, edit.report.mask_area)
        return _Drawn("reused", edit.image, record.settings, record.seed, reuse, edit=edit, report=_report(edit, steps))

    def _edit(self, job: Job, request: EditRequest, steps: StepWatch | None) -> _Drawn:
        record = self.recall.record(request.base)
        base = self.recall.base_of(record)
        settings = record.settings
        if request.guidance is not None:
            settings = replace(settings, guidance=request.guidance)
        if request.negative_prompt is not None:
            settings = replace(settings, negative_prompt=request.negative_prompt)
        edit = self.artist.edit(base, request.prompt, request.mask, record.settings, settings, steps)
        reuse = Reuse("edit", record.id, None, edit.report.mask_area)
        return _Drawn("edit", edit.image, settings, record.seed, reuse, edit=edit, report=_report(edit, steps))

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


def _report(edit: Edit, steps: StepWatch | None) -> dict[str, Any]:
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
        **({"macs_ratio": report.macs["ratio"]} if steps else {}),
    }
