"""What an engine that can't capture, or can't keep what it captured, is answered with; and that no folder is left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from starlette.types import Message

from server.api import activations, errors
from server.engine.bank_directory import BankFull, BankTooSmall
from server.engine.spool import CaptureFailed, Spools
from server.settings import Settings

BODY = {"prompts": [[1, 2, 3]], "sites": ["resid_post.0"]}


class Engine:
    """Fails to capture in the way that it is told to."""

    layers, vocab_size, max_model_len = 2, 16, 64
    points = {"resid_post": {"width": 8, "shards": 1, "reason": None}}

    def __init__(self) -> None:
        self.captures: str | None = None
        self.trouble: Exception | None = None
        self.cancelled = 0

    async def run_capture(self, ids: list[int], spec: Any, **fields: Any) -> Any:
        Path(spec.spool, "some.rows").write_bytes(b"rows")
        if ids == [2]:
            assert self.trouble is not None
            raise self.trouble
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def app(engine: Engine, tmp_path: Path) -> Iterator[FastAPI]:
    app = FastAPI()
    app.include_router(activations.router)
    errors.install(app)
    spools = Spools(tmp_path / "captures")
    app.state.polyhelm = SimpleNamespace(engine=engine, settings=Settings(), captures=spools)
    app.state.openai_serving_chat = None
    yield app
    assert list(spools.own.iterdir()) == []
    spools.close()


def test_an_engine_that_cannot_capture_says_why(app: FastAPI, engine: Engine) -> None:
    engine.captures = "start with --enforce-eager"
    response = TestClient(app).post("/v1/activations", json=BODY)
    assert (response.status_code, response.json()["error"]["message"]) == (400, engine.captures)


@pytest.mark.parametrize(
    ("trouble", "status", "param"),
    [
        (CaptureFailed("the disk is full", "disk"), 507, None),
        (CaptureFailed("beyond float16", "dtype"), 400, "dtype"),
        (CaptureFailed("3 tokens were captured where 4 ran", "lost"), 500, None),
        (BankFull("no room"), 503, "steering"),
        (BankTooSmall("too large"), 400, "steering"),
    ],
)
def test_trouble_with_one_prompt_ends_the_others(
    app: FastAPI, engine: Engine, trouble: Exception, status: int, param: str | None
) -> None:
    engine.trouble = trouble
    response = TestClient(app).post("/v1/activations", json=BODY | {"prompts": [[1], [2], [3]]})
    assert (response.status_code, response.json()["error"]["param"]) == (status, param)
    assert str(trouble) in response.json()["error"]["message"]
    assert engine.cancelled == 2


def test_a_client_that_leaves_cancels_what_runs(app: FastAPI, engine: Engine) -> None:
    messages: list[Message] = [{"type": "http.request", "body": b'{"prompts": [[1], [3]], "sites": ["resid_post.0"]}'}]
    sent: list[Message] = []

    async def receive() -> Message:
        if messages:
            return messages.pop(0)
        await asyncio.sleep(0.2)
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/activations",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 20))
    assert engine.cancelled == 2
    assert sent[0]["status"] == 499
