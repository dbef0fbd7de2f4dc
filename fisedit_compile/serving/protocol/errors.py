"""Errors as OpenAI's API has them: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from fisedit_compile.errors import FiseditError
from fisedit_compile.serving.errors import BusyError, PainterGoneError, PictureGoneError, WithheldPictureError
from fisedit_compile.serving.picture_files import PictureError

logger = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer that is an error.

    Args:
        message: for people.
        status: of HTTP.
        param: the field that it is about.
        code: for programs.
        kind: OpenAI's ``type``.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers
        self.content = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.content, self.status, self.headers)


def api_error(error: BaseException) -> ApiError:
    """An error of any kind as clients are told it; what is a fault of ours is logged, and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError | ValidationError):
        return _invalid(error.errors()[0])
    if isinstance(error, BusyError):
        headers = {"Retry-After": str(error.retry_after)}
        return ApiError(str(error), status=503, code="queue_full", kind="server_error", headers=headers)
    if isinstance(error, PainterGoneError):
        headers = {"Retry-After": "5"}
        return ApiError(str(error), status=503, code="no_replica", kind="server_error", headers=headers)
    if isinstance(error, PictureGoneError):
        return ApiError(str(error), status=404, code="picture_not_found")
    if isinstance(error, WithheldPictureError):
        return ApiError(str(error), code="content_policy_violation", kind="image_generation_user_error")
    if isinstance(error, PictureError):
        return ApiError(str(error), code="invalid_image")
    if isinstance(error, ValueError):  # what the editor refuses of a request, masks among it
        return ApiError(str(error), code="refused")
    if isinstance(error, FiseditError):
        logger.error("a request failed: %s", error)
        return ApiError(str(error), status=500, kind="server_error")
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail), status=error.status_code, headers=dict(error.headers or {}))
    logger.error("a request failed", exc_info=error)
    return ApiError("the service failed; its log says why", status=500, kind="server_error")


def handle_errors(app: FastAPI) -> None:
    """Let an app answer every error in OpenAI's form."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response()

    for kind in (ApiError, FiseditError, ValueError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, answer)


def _invalid(problem: Any) -> ApiError:
    where = [str(each) for each in problem["loc"] if each != "body"]
    param = ".".join(where) or None
    message = f"{param}: {problem['msg']}" if param else str(problem["msg"])
    code = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(problem["type"])
    return ApiError(message, param=param, code=code or "invalid_value")
