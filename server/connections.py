"""Bounds what a client may do before its request has a head: how long it may take, and how many bytes.

uvicorn's fast HTTP parser waits for ever and takes any number of headers.
"""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass
from typing import Any

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeaderLimits:
    """For the request line and the headers together."""

    seconds: float
    bytes: int


def limit(config: Any, limits: HeaderLimits) -> None:
    """Have a uvicorn `Config` make connections that keep to the limits. Call it before it listens."""
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

    base = config.http_protocol_class
    if not issubclass(base, HttpToolsProtocol):
        log.warning("%s waits for headers without end: put a gateway in front, or install httptools", base.__name__)
    elif not hasattr(base, "header_limits"):
        config.http_protocol_class = _limited(base, limits)


def _limited(base: Any, limits: HeaderLimits) -> type:
    class LimitedProtocol(base):  # type: ignore[misc]
        header_limits = limits

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._refused, self._head_bytes = False, 0
            self._timer: asyncio.TimerHandle | None = self.loop.call_later(limits.seconds, self._too_slow)

        def connection_lost(self, exc: Exception | None) -> None:
            self._disarm()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            in_head = self._timer is not None
            if in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            # What came behind the head in one piece is counted with it, and doesn't matter once the head is there.
            if in_head and self._timer is not None and self._head_bytes > limits.bytes:
                self._refuse(431, f"the headers are longer than {limits.bytes} bytes; send less")

        def on_message_begin(self) -> None:
            if self._timer is None:  # another request on the same connection
                self._timer = self.loop.call_later(limits.seconds, self._too_slow)
                self._head_bytes = 0
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._disarm()
            if sum(len(name) + len(value) for name, value in self.headers) + len(self.url) > limits.bytes:
                self._refuse(431, f"the headers are longer than {limits.bytes} bytes; send less")
            else:
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            if not self._refused:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if not self._refused:
                super().on_message_complete()

        def _disarm(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _too_slow(self) -> None:
            # Whoever has sent nothing expects no answer.
            if self._head_bytes:
                self._refuse(408, f"the headers didn't come within {limits.seconds:g} s")
            else:
                self.transport.close()

        def _refuse(self, status: int, message: str) -> None:
            self._disarm()
            self._refused = True
            kind = {408: "RequestTimeoutError", 431: "RequestHeaderFieldsTooLarge"}[status]
            error = {"message": message, "type": kind, "param": None, "code": status}
            body = json.dumps({"error": error}).encode()
            reason = {408: b"Request Timeout", 431: b"Request Header Fields Too Large"}[status]
            self.transport.write(
                b"HTTP/1.1 %d %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s"
                % (status, reason, len(body), body)
            )
            self.transport.close()

    return LimitedProtocol
