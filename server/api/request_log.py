"""Gives every request an id, a span and a line in the log. No line has a text of a request, a key, or a path."""

from __future__ import annotations

import re
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import structlog
from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics, tracing
from server.api.access import OPEN, rule_for
from server.request_context import RequestContext, enter

LogFormat = Literal["auto", "json", "console"]
REQUEST_ID = "X-Request-Id"
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")


def access_logger(form: LogFormat) -> Any:
    """One line per request on standard error: JSON, or for a person who looks on."""
    console = form == "console" or (form == "auto" and sys.stderr.isatty())
    renderer: Any = structlog.dev.ConsoleRenderer() if console else structlog.processors.JSONRenderer()
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    return structlog.wrap_logger(
        structlog.WriteLogger(sys.stderr),
        processors=[stamp, structlog.processors.add_log_level, renderer],
        wrapper_class=structlog.BoundLogger,
    )


@dataclass
class RequestLog:
    """Pure ASGI, around everything else. A client's `X-Request-Id` is kept where it is a plain word."""

    app: ASGIApp
    log: Any = field(default_factory=lambda: access_logger("auto"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = Headers(scope=scope)
        request_id = sent.get(REQUEST_ID, "")
        if not _ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        context = RequestContext(request_id)
        enter(context)
        answer = _Answer(send, request_id)
        started = time.perf_counter()
        path = get_route_path(scope)
        with tracing.server_span(f"{scope['method']} {_route(scope)}", sent) as span:
            scope = dict(scope, headers=_replaced(scope["headers"], {REQUEST_ID: request_id} | tracing.headers()))
            try:
                await self.app(scope, receive, answer.send)
            except Exception:
                answer.status = 500  # which is what Starlette makes of it, outside of here
                raise
            finally:
                route = _route(scope)
                if span is not None:
                    span.update_name(f"{scope['method']} {route}")
                    span.set_attributes({"http.route": route, "http.response.status_code": answer.status})
                if answer.first_byte is not None:
                    metrics.FIRST_BYTE.labels(route).observe(answer.first_byte - started)
                rule = rule_for(path)
                if rule is None or rule.need != OPEN:
                    line = _line(scope, context, answer, route, time.perf_counter() - started)
                    # A log on a full disk: there is nowhere to say so, and the answer mustn't be lost with the line.
                    with suppress(OSError):
                        self.log.info("request", **line)


class _Answer:
    """What became of a request; 499 where the client left before there was an answer."""

    def __init__(self, send: Send, request_id: str) -> None:
        self.status = 499
        self.first_byte: float | None = None
        self._send, self._request_id = send, request_id

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            MutableHeaders(scope=message)[REQUEST_ID] = self._request_id
        elif self.first_byte is None and message.get("body"):
            self.first_byte = time.perf_counter()
        await self._send(message)


def _line(scope: Scope, context: RequestContext, answer: _Answer, route: str, seconds: float) -> dict[str, Any]:
    line = {
        "request_id": context.request_id,
        "trace_id": tracing.trace_id(Headers(scope=scope)),
        "method": scope["method"],
        "route": route,
        "status": answer.status,
        "duration_ms": round(1000 * seconds, 1),
        "key": context.key.id or None,
        "tenant": context.key.tenant,
        "prompt_tokens": context.prompt_tokens or None,
        "completion_tokens": context.completion_tokens or None,
        "steering_fingerprint": context.fingerprint,
        "reject": context.reject,
    }
    return {name: value for name, value in line.items() if value is not None}


def _route(scope: Scope) -> str:
    """The route's own path, with names in the place of what was sent; the method is one of a few, or a made-up one."""
    return str(getattr(scope.get("route"), "path", "unmatched"))


def _replaced(headers: list[tuple[bytes, bytes]], new: dict[str, str]) -> list[tuple[bytes, bytes]]:
    added = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in new.items()]
    names = {name for name, _ in added}
    return [each for each in headers if each[0] not in names] + added
