from __future__ import annotations

import asyncio
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from starlette.types import Message, Scope

from server.api.admission import Load
from server.api.errors import ApiError
from server.api.middleware import check_json
from server.keys import KeyStore
from tests.server.api.guarded_app import Lines, guarded

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Exchange:
    """One request, whose body comes in pieces with pauses before them; and its answer, read at leisure."""

    def __init__(self, app: Any, body: list[tuple[float, bytes]], path: str = "/v1/completions") -> None:
        self.sent: list[Message] = []
        self.pause = 0.0
        """Before each part of the answer is taken."""
        self._app, self._body, self._left = app, list(body), asyncio.Event()
        headers = [(b"content-type", b"application/json")]
        self.scope: Scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers,
            "query_string": b"", "root_path": "", "http_version": "1.1", "scheme": "http", "server": ("x", 1),
            "asgi": {"version": "3.0", "spec_version": "2.3"}, "client": ("y", 2), "state": {},
        }  # fmt: skip

    async def run(self) -> Exchange:
        await self._app(self.scope, self._receive, self._send)
        return self

    def leave(self) -> None:
        self._left.set()

    async def _receive(self) -> Message:
        if not self._body:
            await self._left.wait()
            return {"type": "http.disconnect"}
        pause, part = self._body.pop(0)
        await asyncio.sleep(pause)
        return {"type": "http.request", "body": part, "more_body": bool(self._body)}

    async def _send(self, message: Message) -> None:
        await asyncio.sleep(self.pause)
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent[1:]).decode()


def body(**fields: Any) -> list[tuple[float, bytes]]:
    return [(0, json.dumps(fields).encode())]


async def test_requests_beyond_the_bound_are_503_and_those_inside_run(tmp_path: Path) -> None:
    load = Load(2, 1 << 20)
    app = guarded(KeyStore(tmp_path), load=load)
    running = [asyncio.create_task(Exchange(app, body(seconds=0.2)).run()) for _ in range(2)]
    await asyncio.sleep(0.05)
    refused = await Exchange(app, body()).run()
    assert (refused.status, refused.headers["retry-after"]) == (503, "1")
    assert json.loads(refused.text)["error"]["type"] == "ServiceUnavailableError"
    assert [(await each).status for each in running] == [200, 200]
    assert (load.requests, load.bytes, load.idle.is_set()) == (0, 0, True)
    assert (await Exchange(app, body()).run()).status == 200


async def test_bytes_beyond_the_bound_are_503_and_given_back(tmp_path: Path) -> None:
    load = Load(100, 1000)
    app = guarded(KeyStore(tmp_path), load=load)
    first = asyncio.create_task(Exchange(app, body(seconds=0.2, text="x" * 700)).run())
    await asyncio.sleep(0.05)
    assert load.bytes > 700
    assert (await Exchange(app, body(text="x" * 700)).run()).status == 503
    assert (await Exchange(app, body(text="x" * 100)).run()).status == 200
    assert (await first).status == 200
    assert load.bytes == 0


async def test_body_that_comes_too_slowly_is_408(tmp_path: Path) -> None:
    load, lines = Load(10, 1 << 20), Lines()
    app = guarded(KeyStore(tmp_path), load=load, seconds=0.2, lines=lines)
    drip = [(0.05, b" ")] * 100
    for parts in ([(1.0, b"{}")], drip):
        answer = await Exchange(app, parts).run()
        assert (answer.status, answer.headers["connection"]) == (408, "close")
    assert (load.requests, load.bytes) == (0, 0)
    assert [line["reject"] for line in lines] == ["slow_body"] * 2


async def test_answer_may_take_as_long_as_it_likes(tmp_path: Path) -> None:
    app = guarded(KeyStore(tmp_path), seconds=0.1)
    assert (await Exchange(app, body(seconds=0.4)).run()).status == 200


async def test_client_that_does_not_read_its_answer_is_given_up(tmp_path: Path) -> None:
    load = Load(10, 1 << 20)
    exchange = Exchange(
        guarded(KeyStore(tmp_path), load=load, seconds=0.1), body(plan=["data: a\n\n"] * 3), "/v1/responses"
    )
    exchange.pause = 5.0
    async with asyncio.timeout(2):
        await exchange.run()
    assert (exchange.sent, load.requests) == ([], 0)


async def test_nothing_new_begins_while_draining_and_what_runs_ends(tmp_path: Path) -> None:
    load = Load(10, 1 << 20)
    app = guarded(KeyStore(tmp_path), load=load)
    running = asyncio.create_task(Exchange(app, body(seconds=0.2)).run())
    await asyncio.sleep(0.05)
    load.draining = True
    refused = await Exchange(app, body()).run()
    assert (refused.status, refused.headers["retry-after"]) == (503, "5")
    for path, status in (("/livez", 200), ("/metrics", 200), ("/health", 503)):
        probe = Exchange(app, [(0, b"")], path)
        probe.scope["method"] = "GET"
        assert (await probe.run()).status == status
    assert not load.idle.is_set()
    assert (await running).status == 200
    assert load.idle.is_set()


async def stream(tmp_path: Path, plan: list[Any], interval: float = 0.0) -> Exchange:
    return await Exchange(guarded(KeyStore(tmp_path), interval=interval), body(plan=plan), "/v1/responses").run()


async def test_event_stream_has_the_headers_that_proxies_need(tmp_path: Path) -> None:
    answer = await stream(tmp_path, ["data: a\n\n", "data: [DONE]\n\n"])
    assert (answer.headers["x-accel-buffering"], answer.headers["cache-control"]) == ("no", "no-cache")
    assert answer.text == "data: a\n\ndata: [DONE]\n\n"
    plain = await Exchange(guarded(KeyStore(tmp_path)), body()).run()
    assert not {"x-accel-buffering", "cache-control"} & plain.headers.keys()


async def test_silence_is_filled_with_comments_between_events_only(tmp_path: Path) -> None:
    answer = await stream(tmp_path, [0.25, "data: a", 0.25, "\n\n", 0.25, "data: b\n\n"], interval=0.1)
    start, half, rest = answer.text.partition("data: a\n\n")
    assert half, "no comment got into an event"
    assert start == ": keep-alive\n\n" * 2
    assert rest.count(": keep-alive\n\n") == 2 and rest.endswith("data: b\n\n")
    assert answer.sent[-1].get("more_body", False) is False


async def test_stream_that_talks_gets_no_comments(tmp_path: Path) -> None:
    answer = await stream(tmp_path, [0.03, "data: a\n\n"] * 10, interval=0.2)
    assert answer.text == "data: a\n\n" * 10


@pytest.mark.parametrize(("before", "between"), [("data: a\n\n", ""), ("data: a", "\n\n")])
async def test_error_in_the_middle_is_the_last_event(tmp_path: Path, before: str, between: str) -> None:
    answer = await stream(tmp_path, [before, "!"])
    assert answer.status == 200 and answer.text.startswith(before + between + 'data: {"error"')
    error, done = answer.text.removeprefix(before + between).removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    assert json.loads(error.removeprefix("data: "))["error"].keys() == {"message", "type", "param", "code"}
    assert "broken" not in answer.text, "what went wrong inside is for the log"
    assert answer.sent[-1].get("more_body", False) is False


async def test_client_that_leaves_stops_the_comments(tmp_path: Path) -> None:
    load = Load(10, 1 << 20)
    exchange = Exchange(guarded(KeyStore(tmp_path), load=load, interval=0.05), body(plan=[60]), "/v1/responses")
    task = asyncio.create_task(exchange.run())
    await asyncio.sleep(0.2)
    exchange.leave()
    async with asyncio.timeout(2):
        await task
    sent = len(exchange.sent)
    await asyncio.sleep(0.2)
    assert len(exchange.sent) == sent >= 3
    assert load.requests == 0


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (nested(100), 200),
        (nested(101), 400),
        (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", 400),
        (b'{"a": "' + b"[" * 10_000 + b'"}', 200),
        (b'{"a": "\\"' + b"[{" * 10_000 + b'"}', 200),
        (b'{"a": [' + b"[]," * 5_000 + b"[]]}", 200),
        (b'{"a": "\xff"}', 400),
        ('{"a": "x"}'.encode("utf-16"), 400),
        ('{"a": "x"}'.encode("utf-16-le"), 400),
        ('{"a": "x"}'.encode("utf-32-be"), 400),
        ('{"a": "ü"}'.encode(), 200),
        (b'{"a": "\xed\xa0\x80"}', 400),
    ],
)
async def test_body_that_cannot_be_looked_into_is_400(tmp_path: Path, content: bytes, status: int) -> None:
    assert (await Exchange(guarded(KeyStore(tmp_path)), [(0, content)]).run()).status == status


@pytest.mark.parametrize(
    "content", [b'{"a": "' + b'\\"' * 1_000_000, b'"' * 2_000_001, b'"\\' * 1_000_000 + b"[" * 200]
)
async def test_looking_into_a_body_takes_no_longer_than_it_is_long(content: bytes) -> None:
    started = perf_counter()
    try:
        check_json(content + b"[" * 101)
    except ApiError as error:
        assert error.status == 400
    assert perf_counter() - started < 2


@pytest.mark.parametrize("coding", [b"gzip", b"deflate, gzip", b"br"])
async def test_compressed_body_is_415_and_never_unpacked(tmp_path: Path, coding: bytes) -> None:
    exchange = Exchange(guarded(KeyStore(tmp_path)), body())
    exchange.scope["headers"].append((b"content-encoding", coding))
    assert (await exchange.run()).status == 415
