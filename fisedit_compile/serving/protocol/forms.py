"""The fields of requests: OpenAI's, and ours beside them. An unknown one is an error that names it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fisedit_compile.serving.picture_id import is_picture_id
from fisedit_compile.serving.protocol.errors import ApiError
from fisedit_compile.serving.protocol.limits import Defaults, Limits
from fisedit_compile.serving.requests import ReuseMode, Settings

_SIZE = re.compile(r"(\d{1,6})x(\d{1,6})")

_MOST_SEED = 2**63 - 1


class _Form(BaseModel):
    """What both kinds of request have.

    Attributes:
        output_compression, model, quality, style, moderation, user, input_fidelity: taken, as OpenAI's clients send
            them, and without effect.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    prompt: Annotated[str, Field(min_length=1)]
    model: str | None = None
    n: Annotated[int, Field(ge=1)] = 1
    size: str = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0)] = 0
    background: Literal["auto", "opaque"] = "auto"
    output_format: Literal["png"] = "png"
    output_compression: int | None = None
    quality: str | None = None
    style: str | None = None
    moderation: str | None = None
    user: str | None = None
    input_fidelity: str | None = None

    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    negative_prompt: str | None = None

    def check(self, limits: Limits) -> None:
        """Hold the request to what a client may ask for.

        Raises:
            ApiError: it asks for more.
        """
        texts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt or ""}
        for name, text in texts.items():
            if len(text) > limits.letters:
                raise _too_much(name, f"{len(text)} letters", limits.letters)
        if self.n > limits.pictures:
            raise _too_much("n", str(self.n), limits.pictures)
        if self.steps is not None and self.steps > limits.steps:
            raise _too_much("steps", str(self.steps), limits.steps)
        if self.partial_images > limits.partial_pictures:
            raise _too_much("partial_images", str(self.partial_images), limits.partial_pictures)
        if self.stream and self.n > 1:
            raise ApiError("a stream is of one picture: leave n out", param="n", code="invalid_value")
        if self.stream and self.response_format == "url":
            raise ApiError("a stream brings b64_json", param="response_format", code="invalid_value")


class GenerationForm(_Form):
    """``POST /v1/images/generations``."""

    seed: Annotated[int, Field(ge=0, le=_MOST_SEED)] | None = None
    reuse: ReuseMode = "auto"

    def settings(self, limits: Limits, defaults: Defaults) -> Settings:
        """The settings of the picture.

        Raises:
            ApiError: a size that cannot be drawn, or may not be.
        """
        width, height = self._size(defaults)
        if width * height > limits.pixels:
            raise _too_much("size", f"{width}x{height} pixels", limits.pixels)
        if width % defaults.multiple or height % defaults.multiple or not width * height:
            raise ApiError(
                f"size: {width}x{height} pixels; the sides have to be multiples of {defaults.multiple}",
                param="size",
                code="invalid_value",
            )
        guidance = defaults.guidance if self.guidance is None else self.guidance
        return Settings(width, height, self.steps or defaults.steps, guidance, self.negative_prompt or "")

    def _size(self, defaults: Defaults) -> tuple[int, int]:
        if self.size == "auto":
            return defaults.side, defaults.side
        if not (size := _SIZE.fullmatch(self.size)):
            raise ApiError(f"size: {self.size!r}; give 'auto' or 512x512, say", param="size", code="invalid_value")
        return int(size[1]), int(size[2])


class EditForm(_Form):
    """``POST /v1/images/edits``, but for its files.

    Attributes:
        base: name of the picture to be changed, in place of an image.
        image_prompt: what an image shows that this service did not draw.
        steps: of an image that this service did not draw.
    """

    base: str | None = None
    image_prompt: str | None = None

    def check(self, limits: Limits) -> None:
        super().check(limits)
        if self.n > 1:
            raise ApiError("edits of one picture by the same words are the same: leave n out", param="n")
        if self.base is not None and not is_picture_id(self.base):
            raise ApiError("base: no name of a picture", param="base", code="invalid_value")
        if len(self.image_prompt or "") > limits.letters:
            raise _too_much("image_prompt", f"{len(self.image_prompt or '')} letters", limits.letters)

    def check_size(self, width: int, height: int) -> None:
        """Hold the size that is asked for to that of the picture.

        Raises:
            ApiError: another one.
        """
        if self.size not in ("auto", f"{width}x{height}"):
            raise ApiError(
                f"size: {self.size}; an edit has the size of its picture, {width}x{height}: leave size out",
                param="size",
                code="invalid_value",
            )


def _too_much(param: str, what: str, most: int) -> ApiError:
    return ApiError(f"{param}: {what}; at most {most} are taken", param=param, code="too_much")
