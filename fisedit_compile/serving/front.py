"""The front: decides how a request is answered, and has it computed."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from fisedit_compile.cache.store import BaseStore
from fisedit_compile.errors import SavedBaseError
from fisedit_compile.serving.errors import BusyError, PictureGoneError
from fisedit_compile.serving.library import Library
from fisedit_compile.serving.picture import Picture
from fisedit_compile.serving.picture_id import new_picture_id
from fisedit_compile.serving.request_index import RequestIndex
from fisedit_compile.serving.requests import (
    Answer,
    EditRequest,
    Event,
    Job,
    PhotoRequest,
    Request,
    Reuse,
    ReuseMode,
    Similar,
)
from fisedit_compile.serving.words import WordEncoder

logger = logging.getLogger(__name__)

#: Cosine of the words' embeddings from which a stored picture is changed instead of drawing a new one, and the same for
#: requests that name its seed, which ask for that picture's noise; found by ``benchmarks/similarity.py``
#: (docs/decisions.md).
SIMILAR, SIMILAR_OF_SEED = 0.95, 0.75


class Painter(Protocol):
    """Computes jobs: a :class:`~fisedit_compile.serving.worker.Worker`, or many of them elsewhere."""

    def draw(self, job: Job, *, progress: bool = False, partial_pictures: int = 0) -> AsyncIterator[Event]: ...


@dataclass(frozen=True)
class FrontOptions:
    """How requests are answered.

    Attributes:
        reuse: ``"never"`` draws a new picture for every request, whatever it says.
        similar, similar_of_seed: see :data:`SIMILAR`.
        most_waiting: requests that may be worked on or wait, all together.
        at_once: how many of them are worked on, to tell those that come too many when to come again.
    """

    reuse: ReuseMode = "auto"
    similar: float = SIMILAR
    similar_of_seed: float = SIMILAR_OF_SEED
    most_waiting: int = 64
    at_once: int = 1


class Front:
    """Answers requests from the library, or by a painter.

    Args:
        library: the pictures.
        store: their bases.
        words: embeds the words of requests.
        pipeline: digest of the pipeline that paints.
        painter: computes.
        options: see :class:`FrontOptions`.
    """

    def __init__(
        self,
        library: Library,
        store: BaseStore,
        words: WordEncoder,
        pipeline: str,
        painter: Painter,
        options: FrontOptions | None = None,
    ) -> None:
        self.library, self.pipeline, self.options = library, pipeline, options or FrontOptions()
        self._store, self._words, self._painter = store, words, painter
        self._index = RequestIndex(library, words.digest)
        self._waiting, self._seconds = 0, 1.0
        # One thread: each new one that embeds words would begin with threads of OpenMP of its own.
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")

    async def answer(
        self, request: Request, *, progress: bool = False, partial_pictures: int = 0
    ) -> AsyncIterator[Event]:
        """The steps of a picture, where ``progress`` asks for them, and at last the answer.

        Raises:
            BusyError: too many requests wait.
            PictureGoneError: the picture to be changed is not there.
            FiseditError, ValueError: see :meth:`~fisedit_compile.serving.engine.Engine.draw`.
        """
        if self._waiting >= self.options.most_waiting:
            raise BusyError(self._waiting, math.ceil(self._seconds * self._waiting / self.options.at_once))
        self._waiting += 1
        try:
            plan = await asyncio.get_running_loop().run_in_executor(self._planner, self._plan, request)
            if isinstance(plan, Answer):
                yield plan
                return
            async for event in self._painter.draw(plan, progress=progress, partial_pictures=partial_pictures):
                if isinstance(event, Answer):
                    self._seconds += (event.seconds - self._seconds) / 8
                yield event
        finally:
            self._waiting -= 1

    async def picture(self, name: str) -> Picture:
        """A picture by its name.

        Raises:
            PictureGoneError: there is none.
        """
        found = await asyncio.to_thread(self.library.get, name)
        if found is None:
            raise PictureGoneError(f"there is no picture {name}")
        return found

    async def remove(self, name: str) -> None:
        """Remove a picture and its base. What was made from it stays.

        Raises:
            PictureGoneError: there is none.
        """
        if not await asyncio.to_thread(self.library.remove, name):
            raise PictureGoneError(f"there is no picture {name}")
        try:
            await asyncio.to_thread(self._store.remove, name)
        except SavedBaseError as error:  # none, or one in use: bases without a picture go when the next one is written
            logger.info("the base of the removed picture %s: %s", name, error)

    async def of_pixels(self, pixels: str) -> Picture | None:
        """The picture that a file is of, if this service drew it."""
        return await asyncio.to_thread(self.library.of_pixels, pixels, self.pipeline)

    @property
    def waiting(self) -> int:
        """Requests that are worked on or wait."""
        return self._waiting

    def _plan(self, request: Request) -> Job | Answer:
        """How a request is answered: by a picture that is there, or by what is to be computed."""
        name = new_picture_id()
        if isinstance(request, PhotoRequest):
            return Job(name, request, self.pipeline, name)
        if isinstance(request, EditRequest):
            if (route := self.library.route_of(request.base)) is None:
                raise PictureGoneError(f"there is no picture {request.base}")
            return Job(name, request, self.pipeline, route)
        seed = secrets.randbits(32) if request.seed is None else request.seed
        embedding = self._words.encode(request.prompt)
        similar: Similar | None = None
        why = "reuse is switched off"
        if "never" not in (request.reuse, self.options.reuse):
            key = request.settings.key(self.pipeline)
            if (stored := self.library.exact(key, request.prompt, request.seed)) is not None:
                return _stored(stored, self.library.seconds_of_new(key))
            enough = self.options.similar if request.seed is None else self.options.similar_of_seed
            nearest = self._index.nearest(key, embedding, request.seed, enough)
            why = "there is no picture of these settings"
            if nearest is not None and nearest.similarity >= enough:
                similar, why = nearest, ""
            elif nearest is not None:
                why = f"no stored request is as similar as {enough:.3f}; one has {nearest.similarity:.3f}"
        route = (self.library.route_of(similar.base) if similar else None) or name
        return Job(name, request, self.pipeline, route, seed, similar, why, embedding, self._words.digest)


def _stored(picture: Picture, usual: float | None) -> Answer:
    answer = picture.answer()
    reuse = Reuse("stored", picture.id, similarity=1.0, mask_area=0.0, seconds_saved=usual)
    return Answer(**{**vars(answer), "seconds": 0.0, "reuse": reuse})
