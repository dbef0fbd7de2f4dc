"""What is asked of the service, what is to be computed for it, and what comes of that. Plain data without HTTP."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

ReuseMode = Literal["auto", "never"]


@dataclass(frozen=True)
class Settings:
    """What two requests must have in common, beside the pipeline, for one to use the other's picture.

    Attributes:
        width, height: of the picture, in pixels.
        steps: denoising steps.
        guidance: guidance scale.
        negative_prompt: words that the picture is led away from; empty for none.
    """

    width: int
    height: int
    steps: int
    guidance: float
    negative_prompt: str = ""

    def key(self, pipeline: str) -> str:
        """A hexadecimal key of the settings and of a pipeline's digest."""
        words = json.dumps([pipeline, asdict(self)], sort_keys=True)
        return hashlib.sha256(words.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class GenerationRequest:
    """A picture of some words.

    Attributes:
        prompt: the words.
        settings: see :class:`Settings`.
        seed: of the noise; None takes any, and so any picture of these words that is there.
        reuse: ``"auto"`` may answer with a picture that is there, or change a similar one; ``"never"`` draws a new one.
    """

    prompt: str
    settings: Settings
    seed: int | None = None
    reuse: ReuseMode = "auto"


@dataclass(frozen=True)
class EditRequest:
    """A picture that is there, changed.

    Attributes:
        base: name of the picture.
        prompt: the new words.
        mask: where to change it, PNG of mode L, white is changed; None has it found.
        guidance, negative_prompt: other values than the picture's; None keeps them.
    """

    base: str
    prompt: str
    mask: bytes | None = None
    guidance: float | None = None
    negative_prompt: str | None = None


@dataclass(frozen=True)
class PhotoRequest:
    """A picture that the service did not draw, to be edited under the name that the answer gives it.

    Attributes:
        photo: PNG.
        prompt: what it shows; may be empty.
        steps, guidance: of its edits.
    """

    photo: bytes
    prompt: str
    steps: int
    guidance: float


Request = GenerationRequest | EditRequest | PhotoRequest


@dataclass(frozen=True)
class Similar:
    """A stored picture that a request is similar enough to.

    Attributes:
        base: name of the picture.
        similarity: cosine of the words' embeddings.
    """

    base: str
    similarity: float


@dataclass(frozen=True)
class Job:
    """A picture to be computed. It is decided completely, so that whoever repeats it draws the same picture.

    Attributes:
        id: name of the new picture.
        request: what was asked for.
        pipeline: digest of the pipeline that has to draw it.
        route: jobs of one route are drawn by one process, as long as it lives and has room: a new picture has its own
            name, all that is made from it has that, too.
        seed: of the noise of a new picture.
        similar: what to change instead of drawing a new picture, if it can be.
        why_new: why there is nothing to change, for the answer.
        embedding: of the words, float32 ``[width]``; None where the picture is not to be found by its words.
        encoder: digest of what embedded them.
    """

    id: str
    request: Request
    pipeline: str
    route: str
    seed: int = 0
    similar: Similar | None = None
    why_new: str = ""
    embedding: np.ndarray | None = None
    encoder: str = ""

    @property
    def changes(self) -> str | None:
        """Name of the picture that is changed, if one is."""
        if isinstance(self.request, EditRequest):
            return self.request.base
        return None if self.similar is None else self.similar.base


@dataclass(frozen=True)
class Reuse:
    """What of an answer was there before.

    Attributes:
        kind: ``"stored"``: the picture itself; ``"edit"``: all of another picture outside the mask; ``"none"``.
        base: name of the picture that was used.
        similarity: of its words to the request's, in [-1, 1]; None where the request named it.
        mask_area: share of the picture that was edited.
        seconds_saved: what a new picture takes as a rule, less what this one took; None before one was drawn.
        why: why nothing was reused; else empty.
    """

    kind: Literal["stored", "edit", "none"]
    base: str | None = None
    similarity: float | None = None
    mask_area: float | None = None
    seconds_saved: float | None = None
    why: str = ""


@dataclass(frozen=True)
class Answer:
    """A picture.

    Attributes:
        id: its name.
        prompt: its words.
        settings: see :class:`Settings`.
        seed: of its noise.
        png: the file.
        seconds: that it took.
        reuse: see :class:`Reuse`.
        report: of the editor, where the picture is an edit: what was changed, by which steps, and how long they took.
    """

    id: str
    prompt: str
    settings: Settings
    seed: int
    png: bytes = field(repr=False)
    seconds: float
    reuse: Reuse
    report: dict[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Progress:
    """A step has ended: ``step`` of ``steps``, and the picture as it is then, PNG, where one was asked for."""

    step: int
    steps: int
    png: bytes | None = field(default=None, repr=False)


Event = Progress | Answer
