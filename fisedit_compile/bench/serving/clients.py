"""Users of a service, who ask for what a trace says, and what came of it."""

from __future__ import annotations

import asyncio
import base64
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from fisedit_compile.bench.serving.trace import Asked, User

#: How long a client waits for a picture, and how often it comes again where a service has no room.
_PATIENCE, _TRIES = 600.0, 20


@dataclass(frozen=True)
class Outcome:
    """How a request ended.

    Attributes:
        asked: the request.
        seconds: from sending it to having the picture, waiting for room in between.
        refused: how often there was no room.
        error: what was answered instead of a picture; empty if nothing.
        picture: the answer's picture with all that is said of it.
    """

    asked: Asked
    seconds: float
    refused: int
    error: str
    picture: dict[str, Any]

    @property
    def png(self) -> bytes:
        return base64.b64decode(self.picture["b64_json"])


async def run_trace(
    url: str, users: Sequence[User], *, rate: float | None, at_once: int, seed: int, answered: Callable[[int], None]
) -> list[Outcome]:
    """Let all users have what they ask for.

    Args:
        url: of the service.
        users: the trace.
        rate: requests a second at which users arrive, at random, as many as that makes; None lets ``at_once`` of them
            in, the next when one is through.
        at_once: see ``rate``.
        seed: of the arrivals.
        answered: called with the number of answers so far, behind each.
    """
    chance, outcomes = random.Random(seed), list[Outcome]()
    room = asyncio.Semaphore(at_once if rate is None else len(users))
    limits = httpx.Limits(max_connections=None)

    async with (
        httpx.AsyncClient(base_url=url, timeout=_PATIENCE, limits=limits) as client,
        asyncio.TaskGroup() as group,
    ):

        async def be(user: User) -> None:
            try:
                for asked in user:
                    outcomes.append(await ask(client, asked))
                    answered(len(outcomes))
            finally:
                room.release()

        for user in users:
            await room.acquire()
            group.create_task(be(user))
            if rate is not None:
                await asyncio.sleep(chance.expovariate(rate / len(user)))
    return outcomes


async def ask(client: httpx.AsyncClient, asked: Asked) -> Outcome:
    """One request, made again where the service has no room."""
    begun, refused, error = time.perf_counter(), 0, ""
    for _ in range(_TRIES):
        try:
            answer = await client.post("/v1/images/generations", json={"prompt": asked.prompt, "seed": asked.seed})
        except httpx.HTTPError as failure:
            error = repr(failure)
            break
        if answer.status_code == 200:
            return Outcome(asked, time.perf_counter() - begun, refused, "", answer.json()["data"][0])
        error = answer.text
        if answer.status_code != 503:
            break
        refused += 1
        await asyncio.sleep(float(answer.headers["Retry-After"]))
    return Outcome(asked, time.perf_counter() - begun, refused, error, {})
