"""Server-sent events that get through proxies: headers, comments in a silence, and errors as a last event."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.admission import ClientStalled
from server.api.errors import error_response

log = logging.getLogger(__name__)

COMMENT = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
END = b"\n\n"


@dataclass
class EventStreams:
    """Pure ASGI. `interval` is how many seconds of silence a comment ends; 0 sends none."""

    app: ASGIApp
    interval: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stream = _Stream(send, self.interval)
        try:
            await self.app(scope, receive, stream.send)
        except ClientStalled:
            raise
        except Exception as error:
            if not stream.open:
                raise
            log.exception("an event stream broke off")
            await stream.end_with(error)
        finally:
            await stream.close()


class _Stream:
    """One response; anything but an event stream passes as it is."""

    def __init__(self, send: Send, interval: float) -> None:
        self.open = False
        """Whether it is an event stream that has begun and not ended."""
        self._send = send
        self._interval = interval
        self._sending = asyncio.Lock()
        self._between_events = True
        self._spoke = 0.0
        self._pulse: asyncio.Task[None] | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            if headers.get("content-type", "").startswith("text/event-stream"):
                headers["Cache-Control"] = "no-cache"
                headers["X-Accel-Buffering"] = "no"
                self.open = True
                if self._interval > 0:
                    self._spoke = asyncio.get_running_loop().time()
                    self._pulse = asyncio.create_task(self._keep_alive())
        if not self.open:
            await self._send(message)
            return
        async with self._sending:
            if message["type"] == "http.response.body":
                body = message.get("body", b"")
                self._between_events = body.endswith(END) if body else self._between_events
                self.open = message.get("more_body", False)
            await self._send(message)
            self._spoke = asyncio.get_running_loop().time()

    async def end_with(self, error: Exception) -> None:
        """Tell the client what happened: its status is gone."""
        event = b"data: " + bytes(error_response(error).body) + END
        await self.send({"type": "http.response.body", "body": (b"" if self._between_events else END) + event + DONE})

    async def close(self) -> None:
        if self._pulse is not None:
            self._pulse.cancel()
            await asyncio.wait([self._pulse])
            if not self._pulse.cancelled():
                self._pulse.exception()  # that the client reads no comments is no news: it reads nothing else either

    async def _keep_alive(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(max(self._spoke + self._interval - loop.time(), 0.01))
            if loop.time() < self._spoke + self._interval:
                continue
            async with self._sending:
                if self.open and self._between_events:
                    await self._send({"type": "http.response.body", "body": COMMENT, "more_body": True})
                self._spoke = loop.time()
