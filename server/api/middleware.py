"""Pure-ASGI middleware around vLLM's routes and ours.

`JsonBodies` bounds JSON bodies, and refuses `steering` on routes that would ignore it: vLLM's models accept unknown
fields, so a steered request to a route that can't steer would otherwise be answered with unsteered text. What it can't
look into, for an encoding or for being nested beyond all use, it refuses as well.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.admission import Load
from server.api.errors import ApiError, error_response

STEERABLE = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/activations", "/invocations"})
STREAMED = (
    ("POST", re.compile(r"/v1/artifacts/[^/]+/versions"), b"multipart/form-data"),
    ("PUT", re.compile(r"/v1/kb/collections/[^/]+/facts"), b"application/x-ndjson"),
)
"""What routes read piece by piece, within bounds of their own. Any other route would take such a body into memory,
however long it is, and may take it for the JSON that it expects.
"""
MAX_DEPTH = 100
"""Of arrays and objects in one another: far from where Python's own parser gives up."""
# Atomic, so that no text makes it look twice at anything; one without an end lasts to the end.
_STRINGS = re.compile(rb'(?:[^"\[\]{}]*+"(?:[^"\\]++|\\.)*+(?:"|\\?\Z))++', re.S)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


@dataclass
class JsonBodies:
    """Reads the bodies of POST and PUT requests, but those that their route reads as a stream itself."""

    app: ASGIApp
    max_bytes: int
    load: Load = field(default_factory=lambda: Load(1 << 30, 1 << 62))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in {"POST", "PUT", "PATCH"} or _is_streamed(scope):
            await self.app(scope, receive, send)
            return
        held = _Held(self.load)
        try:
            body = await self._read(scope, receive, held)
            if body is None:
                return
            check_json(body)
            if scope["path"] not in STEERABLE:
                refuse_steering(scope["path"], body)
        except ApiError as error:
            held.let_go()
            await error_response(error)(scope, receive, send)
            return
        try:
            await self.app(scope, _replay(body, receive), send)
        finally:
            held.let_go()

    async def _read(self, scope: Scope, receive: Receive, held: _Held) -> bytes | None:
        """The whole body; None when the client left before its end."""
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ApiError(415, "Content-Encoding isn't supported: send the body as it is", "Content-Encoding")
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                held.let_go()
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False)
            if size > self.max_bytes:
                raise self._too_large()
            held.more(len(chunks[-1]))
        return b"".join(chunks)

    def _too_large(self) -> ApiError:
        # The rest of the body is still on its way: the connection can't be used again.
        return ApiError(
            413,
            f"the body is larger than {self.max_bytes} bytes; send less, or raise POLYHELM_MAX_BODY_BYTES",
            headers={"Connection": "close"},
        )


@dataclass
class _Held:
    """What one request's body takes of the bytes that are allowed for all."""

    load: Load
    size: int = 0

    def more(self, size: int) -> None:
        self.load.hold(size)
        self.size += size

    def let_go(self) -> None:
        self.load.let_go(self.size)
        self.size = 0


def check_json(body: bytes) -> None:
    """Raise ApiError 400 for a body that isn't UTF-8, or whose arrays and objects lie too deep in one another."""
    # Python's parser reads UTF-16 and UTF-32 too, in which nothing here would find a field by its name.
    if b"\0" in body[:4] or not _is_utf8(body):
        raise ApiError(400, "the body isn't UTF-8: this address takes JSON in UTF-8")
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    brackets = np.frombuffer(_STRINGS.sub(b"", body).translate(None, _NO_BRACKETS), np.uint8)
    opening = (brackets == ord("[")) | (brackets == ord("{"))
    if brackets.size and int(np.cumsum(np.where(opening, 1, -1)).max()) > MAX_DEPTH:
        raise ApiError(400, f"the body is nested more than {MAX_DEPTH} deep: make it flatter")


def _is_utf8(body: bytes) -> bool:
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def refuse_steering(path: str, body: bytes) -> None:
    """Raise ApiError 400 when `body` is a JSON object with a `steering` field."""
    # A key may be spelled with escapes.
    if b'"steering"' not in body and b"\\u" not in body:
        return
    try:
        parsed = json.loads(body)
    except ValueError:
        return  # The route itself says what is wrong with it.
    if isinstance(parsed, dict) and parsed.get("steering") is not None:
        raise ApiError(400, f"{path} can't steer: use /v1/chat/completions or /v1/completions", "steering")


def _is_streamed(scope: Scope) -> bool:
    kind = dict(scope["headers"]).get(b"content-type", b"").lower()
    return any(
        scope["method"] == method and path.fullmatch(scope["path"]) and kind.startswith(streamed)
        for method, path, streamed in STREAMED
    )


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
