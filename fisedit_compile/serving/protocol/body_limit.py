"""Requests that are too large, and requests without the token, end before anything is read of them."""

from __future__ import annotations

import contextlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fisedit_compile.serving.protocol.errors import ApiError


class BodyLimit:
    """Lets bodies of up to ``most`` bytes through, whatever their header says of their length."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = ApiError(f"the request has more than {self._most} bytes", status=413, code="too_much")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._most:
            await error.response()(scope, receive, send)
            return
        taken, began = 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._most:
                raise _TooLargeError
            return message

        async def unless_too_large(message: Message) -> None:
            nonlocal began
            if taken <= self._most or began:  # what the app makes of the error is not sent
                began = True
                await send(message)

        with contextlib.suppress(_TooLargeError):
            await self._app(scope, counted, unless_too_large)
        if taken > self._most and not began:
            await error.response()(scope, receive, send)


class _TooLargeError(Exception):
    pass


class TokenNeeded:
    """Lets requests through that bring the token, and those that need none.

    Pictures are given to whoever knows their names, which cannot be guessed, as OpenAI's URLs are; the page asks for
    the token itself.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and _is_guarded(scope["method"], scope["path"]):
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._token):
                error = ApiError(
                    "give the token of this service as the API key",
                    status=401,
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _is_guarded(method: str, path: str) -> bool:
    if path.startswith("/v1/pictures/"):
        return method not in ("GET", "HEAD")
    return path.startswith("/v1/") or path == "/metrics"
