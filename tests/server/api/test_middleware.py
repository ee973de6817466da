from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from server.api.middleware import JsonBodies

LIMIT = 100
DISCONNECT: Message = {"type": "http.disconnect"}


def body(*chunks: bytes) -> list[Message]:
    return [
        {"type": "http.request", "body": chunk, "more_body": index < len(chunks) - 1}
        for index, chunk in enumerate(chunks)
    ]


class Client:
    """Plays messages to the middleware, and records what reached the app and what was answered."""

    def __init__(self) -> None:
        self.reached: list[Message] = []
        self.sent: list[Message] = []
        self.pulled = 0

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        while not self.reached or self.reached[-1].get("more_body"):
            self.reached.append(await receive())
        self.reached.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def call(
        self,
        messages: Sequence[Message],
        path: str = "/v1/completions",
        method: str = "POST",
        headers: dict[str, str] | None = None,
    ) -> None:
        async def receive() -> Message:
            self.pulled += 1
            return messages[self.pulled - 1] if self.pulled <= len(messages) else DISCONNECT

        async def send(message: Message) -> None:
            self.sent.append(message)

        raw = [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()]
        scope: Scope = {"type": "http", "method": method, "path": path, "headers": raw}
        asyncio.run(JsonBodies(self.app, LIMIT)(scope, receive, send))

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def error(self) -> dict[str, Any]:
        return dict(json.loads(self.sent[1]["body"])["error"])


@pytest.fixture
def client() -> Client:
    return Client()


def test_chunked_body_reaches_the_app_whole_and_then_the_disconnect(client: Client) -> None:
    client.call(body(b'{"a":', b"", b" 1}"))
    assert client.reached == [{"type": "http.request", "body": b'{"a": 1}', "more_body": False}, DISCONNECT]


def test_empty_body_reaches_the_app(client: Client) -> None:
    client.call(body(b""))
    assert client.reached[0]["body"] == b""


def test_body_of_the_limit_passes_and_one_byte_more_does_not(client: Client) -> None:
    client.call(body(b"x" * 60, b"y" * 40))
    assert client.status == 200
    other = Client()
    other.call(body(b"x" * 60, b"y" * 41))
    assert (other.status, other.reached) == (413, [])


def test_declared_length_over_the_limit_is_refused_unread(client: Client) -> None:
    client.call(body(b"x"), headers={"Content-Length": "101"})
    assert (client.status, client.pulled, client.reached) == (413, 0, [])
    assert "POLYHELM_MAX_BODY_BYTES" in client.error["message"]
    assert (b"connection", b"close") in client.sent[0]["headers"]


def test_endless_chunked_body_is_read_no_further_than_the_limit(client: Client) -> None:
    client.call([{"type": "http.request", "body": b"x" * 30, "more_body": True}] * 1000)
    assert (client.status, client.pulled, client.reached) == (413, 4, [])


def test_understated_length_does_not_lift_the_limit(client: Client) -> None:
    client.call(body(b"x" * 101), headers={"Content-Length": "5"})
    assert client.status == 413


@pytest.mark.parametrize("declared", ["-1", "", "1e9", "\u0661\u0662\u0663\u0664"])
def test_nonsense_length_does_not_lift_the_limit(client: Client, declared: str) -> None:
    client.call(body(b"x" * 101), headers={"Content-Length": declared})
    assert client.status == 413


def test_client_that_leaves_in_the_middle_is_not_answered(client: Client) -> None:
    client.call([body(b"x", b"y")[0], DISCONNECT])
    assert (client.sent, client.reached) == ([], [])


@pytest.mark.parametrize("method", ["GET", "DELETE", "HEAD"])
def test_other_methods_are_left_alone(client: Client, method: str) -> None:
    client.call(body(b"x" * 500), method=method)
    assert client.status == 200


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "Multipart/Form-Data; boundary=x"])
def test_multipart_is_left_to_its_route_as_it_comes(client: Client, kind: str) -> None:
    messages = body(b"x" * 500, b'"steering"')
    client.call(messages, path="/v1/artifacts/a/versions", headers={"Content-Type": kind})
    assert client.reached[:2] == messages


@pytest.mark.parametrize("kind", ["multipart/form-data; boundary=x", "application/x-ndjson", "text/plain"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/completions"),
        ("POST", "/v1/fits"),
        ("PUT", "/v1/artifacts/a/aliases/b"),
        ("POST", "/v1/artifacts/a/versions/1/yank"),
        ("PUT", "/v1/kb/collections/a"),
        ("POST", "/v1/kb/collections/a/facts/query"),
        ("POST", "/v1/kb/collections/a/facts"),
    ],
)
def test_no_kind_of_body_is_a_way_around_the_limit(client: Client, method: str, path: str, kind: str) -> None:
    client.call(body(*[b"x" * 500] * 50), path=path, method=method, headers={"Content-Type": kind})
    assert (client.status, client.reached) == (413, [])
    assert client.pulled <= 1 + LIMIT // 500


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/invocations"])
def test_steering_passes_where_it_is_applied(client: Client, path: str) -> None:
    client.call(body(b'{"steering": {}}'), path=path)
    assert client.status == 200


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/chat/completions/batch", "/v1/completions/"])
@pytest.mark.parametrize(
    "content", [b'{"steering": {}}', b'{"st\\u0065ering": 1}', b'{"x": 1, "steering": {"interventions": []}}']
)
def test_steering_elsewhere_is_refused(client: Client, path: str, content: bytes) -> None:
    client.call(body(content), path=path)
    assert (client.status, client.error["param"], client.reached) == (400, "steering", [])
    assert path in client.error["message"]


@pytest.mark.parametrize(
    "content",
    [b'{"steering": null}', b'{"input": "\\"steering\\""}', b'["steering"]', b'{"steering": ', b"", b"\\u"],
)
def test_bodies_without_steering_pass_everywhere(client: Client, content: bytes) -> None:
    client.call(body(content), path="/v1/responses")
    assert (client.status, client.reached[0]["body"]) == (200, content)


def test_other_scopes_are_left_alone() -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["type"])

    async def never() -> Message:
        raise AssertionError("read")

    async def unsent(message: Message) -> None:
        raise AssertionError("sent")

    for kind in ("lifespan", "websocket"):
        asyncio.run(JsonBodies(app, LIMIT)({"type": kind}, never, unsent))
    assert seen == ["lifespan", "websocket"]
