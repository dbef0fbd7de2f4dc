"""Waiting for a picture for as long as its client does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from fisedit_compile.serving.protocol.errors import ApiError
from fisedit_compile.serving.requests import Answer, Event

Result = TypeVar("Result")


class ClientGoneError(ApiError):
    """Nobody waits for the answer any more."""

    def __init__(self) -> None:
        super().__init__("the client is gone", status=499)


async def while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of ``work``, which is cancelled when the client goes.

    Args:
        request: its body has been read.
        work: what the client waits for.

    Raises:
        ClientGoneError: it went.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()


async def last(events: AsyncIterator[Event]) -> Answer:
    """The answer that ends the events of a picture."""
    answers = [event async for event in events if isinstance(event, Answer)]
    return answers[0]


def server_sent(kind: str, data: Any) -> str:
    """One server-sent event."""
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n"


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
