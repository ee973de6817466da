"""Pure-ASGI middleware around vLLM's routes and ours.

`JsonBodies` bounds JSON bodies, and refuses `steering` on routes that would ignore it: vLLM's models accept unknown
fields, so a steered request to a route that can't steer would otherwise be answered with unsteered text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import ApiError, error_response

STEERABLE = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/activations", "/invocations"})
MULTIPART = b"multipart/form-data"
NDJSON = b"application/x-ndjson"


@dataclass
class JsonBodies:
    """Reads the bodies of POST and PUT requests, but those that their route reads as a stream itself."""

    app: ASGIApp
    max_bytes: int

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in {"POST", "PUT", "PATCH"} or _is_streamed(scope):
            await self.app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            if body is None:
                return
            if scope["path"] not in STEERABLE:
                refuse_steering(scope["path"], body)
        except ApiError as error:
            await error_response(error)(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client left before its end."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            more = message.get("more_body", False)
            if size > self.max_bytes:
                raise self._too_large()
        return b"".join(chunks)

    def _too_large(self) -> ApiError:
        # The rest of the body is still on its way: the connection can't be used again.
        return ApiError(
            413,
            f"the body is larger than {self.max_bytes} bytes; send less, or raise POLYHELM_MAX_BODY_BYTES",
            headers={"Connection": "close"},
        )


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
    # Any other route might take such a body for the JSON that it expects.
    facts = scope["method"] == "PUT" and scope["path"].startswith("/v1/kb/collections/")
    return kind.startswith(MULTIPART) or (facts and kind.startswith(NDJSON))


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
