"""Errors as HTTP: one table from exception classes to statuses, one from statuses to types, one envelope.

Every error is `{"error": {"message", "type", "param", "code"}}`, as in OpenAI and vLLM; `code` is the HTTP status.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from kb import errors as kb
from kb.encoders import base as encoders
from server import metrics
from steering_store import errors as store

STATUS: dict[type[Exception], int] = {
    store.InvalidName: 422,
    store.InvalidReference: 422,
    store.InvalidManifest: 422,
    store.InvalidTensor: 422,
    store.UnsupportedFile: 415,
    store.TooLarge: 413,
    store.ArtifactNotFound: 404,
    store.PreconditionFailed: 412,
    store.InUse: 409,
    store.Yanked: 409,
    store.CorruptArtifact: 500,
    store.StoreBusy: 503,
    store.StoreFull: 507,
    store.StoreReadOnly: 503,
    store.RemoteUnavailable: 503,
    store.StoreError: 500,
    kb.InvalidFact: 422,
    kb.InvalidFilter: 422,
    kb.InvalidCollection: 422,
    kb.InvalidVector: 422,
    kb.KeyReused: 422,
    kb.FactTooLarge: 413,
    kb.CollectionNotFound: 404,
    kb.FactNotFound: 404,
    kb.EncoderMismatch: 409,
    kb.CollectionDiffers: 409,
    kb.FactConflict: 409,
    kb.DuplicateId: 422,
    kb.KbBusy: 503,
    kb.KbFull: 507,
    kb.KbUnavailable: 503,
    kb.KbError: 500,
    encoders.InvalidText: 422,
    encoders.UnknownEncoder: 500,
    encoders.EncoderUnavailable: 503,
    encoders.EncoderError: 500,
}

TYPES: dict[int, str] = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    409: "ConflictError",
    412: "PreconditionFailedError",
    413: "RequestTooLarge",
    415: "UnsupportedMediaType",
    416: "RangeNotSatisfiableError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    507: "InsufficientStorageError",
}

RETRY_AFTER_SECONDS = {429: "1", 503: "1"}


class Problem(BaseModel):
    """What is wrong; `param` is the field at fault, and `code` the HTTP status."""

    message: str
    type: str
    param: str | None
    code: int


class Envelope(BaseModel):
    """Every answer other than success."""

    error: Problem


RESPONSES: dict[int | str, dict[str, Any]] = {422: {"model": Envelope}, "default": {"model": Envelope}}
"""For the OpenAPI of every route of ours."""


class ApiError(Exception):
    """An answer other than success: a status, a message that names the remedy, and the field at fault.

    `reason` is a word for the metrics and the log, by default one that the status stands for.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        reason: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})
        self.reason = reason


def error_response(exc: Exception) -> JSONResponse:
    """Render an exception in the envelope; one that is in no table is a 500 that tells nothing about the inside."""
    error = _as_api_error(exc)
    metrics.rejected(error.reason or _snake(_kind(error)))
    headers = error.headers
    if error.status in RETRY_AFTER_SECONDS:
        headers = {"Retry-After": RETRY_AFTER_SECONDS[error.status], **headers}
    return JSONResponse({"error": error_body(error)}, error.status, headers)


def error_body(exc: Exception) -> dict[str, Any]:
    """What `error` holds in an answer, or beside other results in one."""
    error = _as_api_error(exc)
    return {"message": error.message, "type": _kind(error), "param": error.param, "code": error.status}


def _kind(error: ApiError) -> str:
    return TYPES.get(error.status, "BadRequestError" if error.status < 500 else "InternalServerError")


def install(app: FastAPI) -> None:
    """Answer ApiError, every exception of the table, and paths and methods that no route has, in the envelope."""

    async def handle(request: Request, exc: Exception) -> Response:
        return error_response(exc)

    # Starlette's own class is what its router raises; vLLM's handler for FastAPI's subclass stays in charge of that.
    classes: tuple[type[Exception], ...] = (ApiError, HTTPException, *STATUS)
    for cls in classes:
        app.add_exception_handler(cls, handle)


class EnvelopeRoute(APIRoute):
    """A route whose validation errors are 422 in the envelope; for our routers, so that vLLM's keep their own."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def in_envelope(request: Request) -> Response:
            try:
                return await handler(request)
            except (RequestValidationError, HTTPException) as exc:
                return error_response(exc)

        return in_envelope


def _as_api_error(exc: Exception) -> ApiError:
    if isinstance(exc, ApiError):
        return exc
    if isinstance(exc, RequestValidationError):
        return _first_bad_field(exc)
    if isinstance(exc, HTTPException):
        return ApiError(exc.status_code, str(exc.detail), headers=exc.headers)
    for cls in type(exc).__mro__:
        if cls in STATUS:
            return ApiError(STATUS[cls], str(exc), getattr(exc, "param", None))
    return ApiError(500, "internal error; the server's log has the details")


def _snake(kind: str) -> str:
    """`not_found` of `NotFoundError`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.removesuffix("Error")).lower()


def _first_bad_field(exc: RequestValidationError) -> ApiError:
    error = exc.errors()[0]
    if error["type"] == "json_invalid":
        return ApiError(422, f"the body is not JSON ({error['ctx']['error']}); send a JSON object")
    # The first part says only where the field was: body, query, path, header.
    place, *path = error["loc"]
    param = ".".join(str(part) for part in path) or str(place)
    remedy = "remove it" if error["type"] == "extra_forbidden" else "correct it and send the request again"
    return ApiError(422, f"{place} field {param!r}: {error['msg']}; {remedy}", param)
