"""How much runs at a time: requests and the bytes of their bodies are bounded, and nothing new begins while draining.

Beyond the bounds a request is refused with 503 and `Retry-After`, before its body is read. A client that stops sending
its body, or reading its answer, is given up.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import metrics
from server.api.access import OPEN, rule_for
from server.api.errors import ApiError, error_response

MIN_BYTES_PER_SECOND = 1024
"""A body that comes more slowly than that for long is given up."""


@dataclass
class Load:
    """What one API process is at. For its event loop."""

    max_requests: int
    max_bytes: int
    requests: int = 0
    bytes: int = 0
    draining: bool = False
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set while nothing runs."""

    def __post_init__(self) -> None:
        self.idle.set()

    def enter(self) -> None:
        """Raises ApiError 503."""
        if self.draining:
            raise _overloaded("this server is going down", "draining", "5")
        if self.requests >= self.max_requests:
            raise _overloaded(f"{self.requests} requests are running", "overload_requests", "1")
        self.requests += 1
        self.idle.clear()
        metrics.IN_FLIGHT.set(self.requests)

    def leave(self) -> None:
        self.requests -= 1
        metrics.IN_FLIGHT.set(self.requests)
        if not self.requests:
            self.idle.set()

    def hold(self, size: int) -> None:
        """Account for bytes of a body. Raises ApiError 503 where they are too many, with those of other requests."""
        if self.bytes + size > self.max_bytes:
            raise _overloaded(f"the bodies of running requests take {self.bytes} bytes", "overload_bytes", "1")
        self.bytes += size
        metrics.IN_FLIGHT_BYTES.set(self.bytes)

    def let_go(self, size: int) -> None:
        self.bytes -= size
        metrics.IN_FLIGHT_BYTES.set(self.bytes)


@dataclass
class Admission:
    """Pure ASGI. `seconds` is how long a client may keep the server waiting: for a body, beside what it takes at the
    slowest allowed rate, or for reading a part of an answer.
    """

    app: ASGIApp
    load: Load
    seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._passes(get_route_path(scope)):
            await self.app(scope, receive, send)
            return
        try:
            self.load.enter()
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        try:
            await self.app(scope, self._timed(receive), self._until_read(send))
        except ClientStalled:
            # The server closes the connection of an answer that was begun and not ended.
            pass
        finally:
            self.load.leave()

    def _passes(self, path: str) -> bool:
        """Probes always do, but for vLLM's, which have no way to say that the server is going down."""
        rule = rule_for(path)
        return rule is not None and rule.need == OPEN and not (self.load.draining and path in ("/health", "/ping"))

    def _timed(self, receive: Receive) -> Receive:
        deadline, whole = asyncio.get_running_loop().time() + self.seconds, False

        async def receiving() -> Message:
            nonlocal deadline, whole
            if whole:  # what comes now is that the client has left, whenever that is
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408,
                    f"the body came too slowly: send it within {self.seconds:g} s, or {MIN_BYTES_PER_SECOND} bytes/s",
                    headers={"Connection": "close"},
                    reason="slow_body",
                ) from None
            deadline += len(message.get("body", b"")) / MIN_BYTES_PER_SECOND
            whole = not message.get("more_body", False)
            return message

        return receiving

    def _until_read(self, send: Send) -> Send:
        async def sending(message: Message) -> None:
            try:
                async with asyncio.timeout(self.seconds):
                    await send(message)
            except TimeoutError:
                raise ClientStalled from None

        return sending


class ClientStalled(OSError):
    """The client doesn't read its answer."""


def _overloaded(what: str, reason: str, retry_after: str) -> ApiError:
    return ApiError(503, f"{what}: retry later, or elsewhere", headers={"Retry-After": retry_after}, reason=reason)
