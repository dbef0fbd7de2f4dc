"""The service over HTTP: OpenAI's images API, and pictures by their names."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile

from fisedit_compile.serving.front import Front
from fisedit_compile.serving.picture import Picture
from fisedit_compile.serving.picture_files import mask_png, of_png, photo_png, pixels_digest, read_picture
from fisedit_compile.serving.picture_id import is_picture_id
from fisedit_compile.serving.protocol.body_limit import BodyLimit, TokenNeeded
from fisedit_compile.serving.protocol.errors import ApiError, api_error, handle_errors
from fisedit_compile.serving.protocol.forms import EditForm, GenerationForm
from fisedit_compile.serving.protocol.limits import Defaults, Limits
from fisedit_compile.serving.protocol.waiting import last, server_sent, while_connected
from fisedit_compile.serving.requests import (
    Answer,
    EditRequest,
    Event,
    GenerationRequest,
    PhotoRequest,
)
from fisedit_compile.serving.requests import (
    Request as PictureRequest,
)


def build_app(
    front: Front,
    defaults: Defaults,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    ready: Callable[[], Awaitable[bool]] | None = None,
    metrics: Callable[[], Awaitable[str]] | None = None,
) -> FastAPI:
    """The app.

    Args:
        front: answers.
        defaults: of requests.
        limits: of requests.
        token: that clients have to bring; None lets everyone in.
        ready: whether pictures can be drawn now; None is always.
        metrics: what was counted, in Prometheus' format; None counts nothing.
    """
    app = FastAPI(title="fisedit-compile", openapi_url=None)
    service = _Service(front, defaults, limits or Limits())
    handle_errors(app)
    app.post("/v1/images/generations")(service.generations)
    app.post("/v1/images/edits")(service.edits)
    app.get("/v1/pictures/{name}")(service.picture)
    app.delete("/v1/pictures/{name}")(service.remove)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/ready")
    async def is_ready() -> JSONResponse:
        well = ready is None or await ready()
        return JSONResponse({"ready": well, "waiting": front.waiting}, 200 if well else 503)

    if metrics is not None:

        @app.get("/metrics")
        async def counted() -> Response:
            return Response(await metrics(), media_type="text/plain; version=0.0.4")

    @app.api_route("/v1/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    async def unknown(rest: str) -> None:
        raise ApiError(f"there is no /v1/{rest} here", status=404, code="unknown_url")

    app.add_middleware(BodyLimit, most=service.limits.body_bytes)
    if token is not None:
        app.add_middleware(TokenNeeded, token=token)  # the last that is added is asked first
    return app


class _Service:
    def __init__(self, front: Front, defaults: Defaults, limits: Limits) -> None:
        self.front, self.defaults, self.limits = front, defaults, limits

    async def generations(self, form: GenerationForm, request: Request) -> Response:
        form.check(self.limits)
        settings = form.settings(self.limits, self.defaults)
        # Of several pictures without a seed the first alone may be one that is there: the others would be the same.
        requests: list[PictureRequest] = [
            GenerationRequest(form.prompt, settings, None if form.seed is None else form.seed + i, form.reuse)
            if form.seed is not None or i == 0
            else GenerationRequest(form.prompt, settings, None, "never")
            for i in range(form.n)
        ]
        if form.stream:
            return await self._stream(request, requests[0], form, "image_generation")
        return await self._answer(request, requests, form)

    async def edits(self, request: Request) -> Response:
        async with request.form(max_files=4, max_fields=40, max_part_size=2**20) as parts:
            fields = {name: value for name, value in parts.items() if not isinstance(value, UploadFile)}
            form = EditForm.model_validate(fields)
            form.check(self.limits)
            images = [each for name in ("image", "image[]") for each in parts.getlist(name)]
            if len(images) > 1:
                raise ApiError("several images: one is edited", param="image", code="invalid_value")
            image = await _file(images[0], "image") if images else None
            masks = parts.getlist("mask")
            mask = await _file(masks[0], "mask") if masks else None
        base = await self._base(request, form, image)
        if mask is None and not base.prompt:
            raise ApiError(
                "mask: give one, or say by image_prompt what the image shows: a mask is found by words that differ",
                param="mask",
                code="missing_required_parameter",
            )
        marked = await asyncio.to_thread(self._mask, mask) if mask is not None else None
        edit = EditRequest(base.id, form.prompt, marked, form.guidance, form.negative_prompt)
        if form.stream:
            return await self._stream(request, edit, form, "image_edit")
        return await self._answer(request, [edit], form)

    async def picture(self, name: str) -> Response:
        picture = await self.front.picture(_checked(name))
        headers = {"Cache-Control": "private, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}
        return Response(picture.png, media_type="image/png", headers=headers)

    async def remove(self, name: str) -> dict[str, Any]:
        await self.front.remove(_checked(name))
        return {"id": name, "object": "picture", "deleted": True}

    async def _base(self, request: Request, form: EditForm, image: bytes | None) -> Picture:
        """The picture that is to be changed; an image that is none of the service's becomes one.

        Raises:
            ApiError: neither, or both of which one is another picture.
        """
        if image is None:
            if form.base is None:
                raise ApiError("give an image, or base", param="image", code="missing_required_parameter")
            picture = await self.front.picture(form.base)
            form.check_size(picture.settings.width, picture.settings.height)
            return picture
        photo = await asyncio.to_thread(read_picture, image, most_pixels=self.limits.pixels)
        png = await asyncio.to_thread(photo_png, photo)
        drawn = await asyncio.to_thread(lambda: pixels_digest(of_png(png)))
        if form.base is not None:
            picture = await self.front.picture(form.base)
            if picture.pixels != drawn:
                raise ApiError("the image is another picture than base: give one of them", param="base")
            return picture
        form.check_size(photo.width, photo.height)
        if form.steps is None and form.image_prompt is None and (known := await self.front.of_pixels(drawn)):
            return known
        kept = PhotoRequest(
            png,
            form.image_prompt or "",
            form.steps or self.defaults.steps,
            self.defaults.guidance if form.guidance is None else form.guidance,
        )
        answer = await while_connected(request, last(self.front.answer(kept)))
        return await self.front.picture(answer.id)

    def _mask(self, mask: bytes) -> bytes:
        return mask_png(read_picture(mask, most_pixels=self.limits.pixels))

    async def _answer(
        self, request: Request, requests: list[PictureRequest], form: GenerationForm | EditForm
    ) -> Response:
        async def draw() -> list[Answer]:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(last(self.front.answer(each))) for each in requests]
            return [task.result() for task in tasks]

        try:
            answers = await while_connected(request, draw())
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        data = [{**_picture(answer, form, str(request.base_url)), **_ours(answer)} for answer in answers]
        return JSONResponse({"created": int(time.time()), "data": data, **_common(answers[0])})

    async def _stream(
        self, request: Request, what: PictureRequest, form: GenerationForm | EditForm, kind: str
    ) -> Response:
        events = self.front.answer(what, progress=form.partial_images > 0, partial_pictures=form.partial_images)
        first = await while_connected(request, _next(events))  # what is refused is an error, and no stream
        return StreamingResponse(_server_sent(first, events, kind), media_type="text/event-stream")


async def _next(events: AsyncIterator[Event]) -> Event | None:
    return await anext(events, None)


async def _server_sent(first: Event | None, rest: AsyncIterator[Event], kind: str) -> AsyncIterator[str]:
    """The events of a picture as OpenAI's clients read them."""
    index = 0
    try:
        event = first
        while event is not None:
            png = event.png
            about = {"created_at": int(time.time()), "b64_json": base64.b64encode(png).decode() if png else None}
            if isinstance(event, Answer):
                about |= {**_common(event), **_ours(event)}
                yield server_sent(f"{kind}.completed", {"type": f"{kind}.completed", **about})
            elif png is not None:
                about |= {"partial_image_index": index, "output_format": "png", "quality": "auto", "size": "auto"}
                about |= {"background": "opaque"}
                yield server_sent(f"{kind}.partial_image", {"type": f"{kind}.partial_image", **about})
                index += 1
            event = await _next(rest)
    except Exception as error:
        yield server_sent("error", api_error(error).content)


def _picture(answer: Answer, form: GenerationForm | EditForm, url: str) -> dict[str, str]:
    if form.response_format == "url":
        return {"url": f"{url}v1/pictures/{answer.id}"}
    return {"b64_json": base64.b64encode(answer.png).decode()}


def _common(answer: Answer) -> dict[str, str]:
    size = f"{answer.settings.width}x{answer.settings.height}"
    return {"size": size, "output_format": "png", "background": "opaque", "quality": "auto"}


def _ours(answer: Answer) -> dict[str, Any]:
    """What is in an answer beside OpenAI's fields."""
    settings = {name: getattr(answer.settings, name) for name in ("steps", "guidance", "negative_prompt")}
    return {
        "id": answer.id,
        "seed": answer.seed,
        **settings,
        "seconds": answer.seconds,
        "reuse": asdict(answer.reuse),
        "report": answer.report,
    }


def _checked(name: str) -> str:
    if not is_picture_id(name):
        raise ApiError("no name of a picture", status=404, code="picture_not_found")
    return name


async def _file(part: UploadFile | str, name: str) -> bytes:
    if isinstance(part, str):
        raise ApiError(f"{name}: a text; give a file", param=name, code="invalid_value")
    return await part.read()
