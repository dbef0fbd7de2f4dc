"""A picture as a library keeps it: what was drawn, how, and where its base is."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from fisedit_compile.serving.requests import Answer, Reuse, Settings


class BasePlace(IntEnum):
    """Where the base of a picture is, as far as the file knows."""

    NOWHERE = 0  # it has to be drawn again
    HELD = 1  # in the memory of the process that drew it, which is about to save it
    SAVED = 2  # in the store
    EDIT = 3  # not there, but recorded in a part of a new picture's time by the process that made the edit


@dataclass(frozen=True)
class Picture:
    """A picture that was drawn.

    Attributes:
        id: its name, and that of its base in the store.
        kind: ``"new"``; ``"reused"``: an edit of a similar picture, which the service chose; ``"edit"``: one that
            somebody asked for; ``"photo"``: not drawn at all.
        prompt: its words.
        key: of settings and pipeline, see :meth:`~fisedit_compile.serving.requests.Settings.key`.
        pipeline: digest of what drew it.
        route: see :class:`~fisedit_compile.serving.requests.Job`: the process that drew it may hold its base.
        settings, seed: see :class:`~fisedit_compile.serving.requests.Answer`.
        parent: the picture that it was edited from.
        mask: that was given for the edit, PNG.
        embedding, encoder: see :class:`~fisedit_compile.serving.requests.Job`.
        png: the file.
        pixels: a hexadecimal digest of the picture's pixels.
        seconds: that it took.
        reuse, report: see :class:`~fisedit_compile.serving.requests.Answer`.
        base: where its base is.
        created: seconds since 1970.
    """

    id: str
    kind: str
    prompt: str
    key: str
    pipeline: str
    route: str
    settings: Settings
    seed: int
    parent: str | None
    mask: bytes | None
    embedding: np.ndarray | None
    encoder: str
    png: bytes = field(repr=False)
    pixels: str
    seconds: float
    reuse: dict[str, Any]
    report: dict[str, Any]
    base: BasePlace = BasePlace.HELD
    created: float = field(default_factory=time.time)

    def answer(self) -> Answer:
        """The answer that the picture was given with."""
        return Answer(
            id=self.id,
            prompt=self.prompt,
            settings=self.settings,
            seed=self.seed,
            png=self.png,
            seconds=self.seconds,
            reuse=Reuse(**self.reuse),
            report=self.report,
        )
