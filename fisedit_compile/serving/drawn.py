"""What a job comes to, and the picture that a library keeps of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fisedit_compile.serving.errors import WithheldPictureError
from fisedit_compile.serving.picture import BasePlace, Picture
from fisedit_compile.serving.picture_files import as_png, pixels_digest
from fisedit_compile.serving.requests import EditRequest, Job, Reuse, Settings

if TYPE_CHECKING:
    from fisedit_compile.editing.base import Base
    from fisedit_compile.editing.result import Edit


@dataclass(frozen=True)
class Drawn:
    """What a job comes to, before it is written down; with its base, or the edit that it is, or neither.

    Attributes:
        flags: of the safety checker, one a picture; None without one.
    """

    kind: str
    image: Any
    settings: Settings
    seed: int
    reuse: Reuse
    flags: Sequence[bool] | None
    base: Base | None = None
    edit: Edit | None = None
    report: dict[str, Any] = field(default_factory=dict)

    def picture(self, job: Job, pipeline: str, seconds: float, usual: float | None) -> Picture:
        """As a library keeps it.

        Args:
            job: that it was drawn for.
            pipeline: digest of the pipeline that drew it.
            seconds: that it took.
            usual: that new pictures of its settings take; None before one was drawn.

        Raises:
            WithheldPictureError: the safety checker blackened it.
        """
        if self.flags and any(self.flags):
            raise WithheldPictureError("the safety checker withheld the picture: try other words")
        saved = usual - seconds if usual is not None and self.edit is not None else None
        request = job.request
        return Picture(
            id=job.id,
            kind=self.kind,
            prompt=request.prompt,
            key=self.settings.key(pipeline),
            pipeline=pipeline,
            route=job.route,
            settings=self.settings,
            seed=self.seed,
            parent=self.reuse.base,
            mask=request.mask if isinstance(request, EditRequest) else None,
            embedding=job.embedding,
            encoder=job.encoder,
            png=as_png(self.image),
            pixels=pixels_digest(self.image),
            seconds=seconds,
            reuse=vars(self.reuse) | {"seconds_saved": saved},
            report=self.report,
            base=self._place,
        )

    @property
    def _place(self) -> BasePlace:
        """Where its base is; one of an edit that visited every step takes as long as a new picture."""
        if self.edit is None:
            return BasePlace.NOWHERE if self.base is None else BasePlace.HELD
        visits_all = len(self.edit.trajectory.visits) == self.edit.trajectory.steps
        return BasePlace.NOWHERE if visits_all else BasePlace.EDIT
