"""Pictures that are changed: what of which base, and which of them can be changed together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fisedit_compile.errors import BaseMemoryError, FiseditError, PipelineInterruptedError
from fisedit_compile.serving.artist import Artist
from fisedit_compile.serving.drawn import Drawn
from fisedit_compile.serving.errors import PictureGoneError
from fisedit_compile.serving.held_bases import HeldBases
from fisedit_compile.serving.library import Library
from fisedit_compile.serving.picture import BasePlace, Picture
from fisedit_compile.serving.recall import Recall
from fisedit_compile.serving.requests import EditRequest, GenerationRequest, Job, Reuse, Settings
from fisedit_compile.serving.tasks import Task

if TYPE_CHECKING:
    from fisedit_compile.editing.edit_request import EditRequest as AskedEdit
    from fisedit_compile.editing.editor import Editor
    from fisedit_compile.editing.result import Edit


#: Share of the steps that keep the attention maps of a picture which the service chose to change. Whoever asked for a
#: new picture expects the new words to be drawn as one would draw them, not the shapes of the old ones to be kept.
_CONTROL = 0.0


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

    def drawn(self, task: Task, edit: Edit) -> Drawn:
        """What the edit comes to."""
        chosen = task.job.similar
        reuse = Reuse("edit", self.record.id, chosen.similarity if chosen else None, edit.report.mask_area)
        kind, seed = ("reused" if chosen else "edit"), self.record.seed
        return Drawn(
            kind, edit.image, self.settings, seed, reuse, edit.nsfw, edit=edit, report=_report(edit, self.asked, task)
        )


class Changes:
    """Makes the edits of an engine.

    Args:
        editor, artist, bases, library, recall: of the engine.
    """

    def __init__(self, editor: Editor, artist: Artist, bases: HeldBases, library: Library, recall: Recall) -> None:
        self._editor, self._artist, self._bases = editor, artist, bases
        self._library, self._recall = library, recall

    def together(self, job: Job) -> Hashable | None:
        """What jobs have in common whose edits can be made together; None of one that is drawn alone.

        Masks are all given or all found: else their first steps would be two batches.
        """
        request = job.request
        if isinstance(request, EditRequest):
            record = self._library.get(request.base)
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
        return name is not None and self._bases.holds(name)

    def make(self, tasks: Sequence[Task]) -> dict[Task, Drawn | Exception]:
        """What edits come to, or why each of them cannot be made.

        Raises:
            PipelineInterruptedError: they were stopped.
            BaseMemoryError: there is no room for them, or for one of their bases.
            FiseditError, ValueError: they cannot be made together.
        """
        results: dict[Task, Drawn | Exception] = {}
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
            edits = self._editor.edit_many(asked, return_exceptions=True)
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
            record = self._recall.record(request.base)
            base = self._recall.base_of(record)
            settings = record.settings
            if request.guidance is not None:
                settings = replace(settings, guidance=request.guidance)
            if request.negative_prompt is not None:
                settings = replace(settings, negative_prompt=request.negative_prompt)
            given = (base, request.prompt, request.mask, record.settings, settings, task.steps)
            return _Change(record, self._artist.request(*given), settings)
        assert isinstance(request, GenerationRequest)
        assert job.similar is not None
        found = self._library.get(job.similar.base)
        held = None if found is None else self._recall.at_hand(found)
        if found is None or held is None:
            self._library.note_base(job.similar.base, BasePlace.NOWHERE)
            raise PictureGoneError("the base of the similar picture is not there any more")
        # An edit of a larger mask runs dense, which is worth it where it visits fewer steps than a new picture has.
        visits_all = len(held.visits) == len(held.step_latents)
        largest = self._editor.config.dense_above if visits_all else 1.0
        same = (found.settings, found.settings)
        asked = self._artist.request(
            held, request.prompt, None, *same, task.steps, largest_mask=largest, cross_replace=_CONTROL
        )
        return _Change(found, asked, found.settings)


def _report(edit: Edit, asked: AskedEdit, task: Task) -> dict[str, Any]:
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
        "cross_replace": asked.cross_replace,
        **({"macs_ratio": report.macs["ratio"]} if task.watch else {}),
    }
