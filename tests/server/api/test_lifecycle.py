from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

from server.api.admission import Load
from server.api.lifecycle import Lifecycle
from server.connections import HeaderLimits

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Engine:
    def __init__(self) -> None:
        self.closings: list[tuple[float, float | None]] = []
        self.alive, self.closed, self.read = True, False, True
        self.client = SimpleNamespace(shutdown=self._close)

    def _close(self, timeout: float | None = None) -> None:
        assert self.closed, "who asks must know before anything is refused"
        self.closings.append((time.monotonic(), timeout))
        self.alive = False

    def stop_reading(self) -> None:
        assert not self.closings
        self.read = False


def parts(drain: float = 5.0) -> tuple[Any, Load, Lifecycle]:
    engine, load = Engine(), Load(10, 1000)
    return engine, load, Lifecycle(engine, load, drain)  # type: ignore[arg-type]


async def close(engine: Any, timeout: float | None = 10.0) -> None:
    """As vLLM does when a signal comes."""
    await asyncio.get_running_loop().run_in_executor(None, lambda: engine.client.shutdown(timeout=timeout))


async def test_engine_is_closed_only_once_nothing_runs() -> None:
    engine, load, _ = parts()
    load.enter()
    closing = asyncio.create_task(close(engine))
    await asyncio.sleep(0.2)
    assert (load.draining, engine.closings) == (True, [])
    load.leave()
    await closing
    ((_, left),) = engine.closings
    assert left is not None and 9 < left < 10, "what the drain took is gone from the time to close"


async def test_drain_ends_after_its_time() -> None:
    engine, load, _ = parts(drain=0.2)
    load.enter()
    started = time.monotonic()
    await close(engine, timeout=0.3)
    assert 0.2 <= time.monotonic() - started < 10
    assert engine.closings[0][1] == 1.0, "the engine gets some time to end, however late it is"
    assert engine.read, "what runs still hears of its end"


async def test_close_from_the_loop_itself_does_not_wait_for_it() -> None:
    engine, load, _ = parts()
    load.enter()
    engine.client.shutdown(timeout=None)
    assert engine.closings[0][1] is None


async def test_idle_engine_is_closed_at_once() -> None:
    engine, load, _ = parts()
    started = time.monotonic()
    await close(engine)
    assert time.monotonic() - started < 10
    assert not engine.read


async def serve(lifecycle: Lifecycle, then: Any) -> Any:
    app = FastAPI()
    lifecycle.install(app, HeaderLimits(1, 1))
    server = SimpleNamespace(
        should_exit=False, force_exit=False, config=SimpleNamespace(http_protocol_class=asyncio.Protocol)
    )
    app.state.server = server
    async with app.router.lifespan_context(app):
        await then()
    return server


@pytest.mark.parametrize("running", [0, 1])
async def test_dead_engine_ends_the_server_also_where_requests_hang(
    monkeypatch: pytest.MonkeyPatch, running: int
) -> None:
    monkeypatch.setattr("server.api.lifecycle.LAST_WORDS_SECONDS", 0.2)
    monkeypatch.setattr("server.api.lifecycle.WATCH_SECONDS", 0.05)
    engine, load, lifecycle = parts()
    for _ in range(running):
        load.enter()

    async def die() -> None:
        await asyncio.sleep(0.1)
        engine.alive = False
        await asyncio.sleep(0.5)

    server = await serve(lifecycle, die)
    assert (server.should_exit, server.force_exit, lifecycle.engine_died) == (True, True, True)
    engine.client.shutdown(timeout=0)
    assert len(engine.closings) == 1


async def test_death_is_told_also_where_vllm_ends_the_server_first() -> None:
    engine, _, lifecycle = parts()
    engine.alive = False
    await close(engine)
    assert lifecycle.engine_died
    await close(engine)
    assert len(engine.closings) == 2


async def test_engine_that_dies_while_requests_end_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.lifecycle.WATCH_SECONDS", 0.05)
    engine, load, lifecycle = parts()
    load.enter()

    async def die() -> None:
        closing = asyncio.create_task(close(engine))
        await asyncio.sleep(0.1)
        engine.alive = False
        await asyncio.sleep(0.2)
        load.leave()
        await closing

    await serve(lifecycle, die)
    assert lifecycle.engine_died


async def test_closed_engine_is_no_dead_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.lifecycle.WATCH_SECONDS", 0.05)
    engine, _, lifecycle = parts()

    async def end() -> None:
        await close(engine)
        await asyncio.sleep(0.2)

    server = await serve(lifecycle, end)
    assert (server.should_exit, lifecycle.engine_died) == (False, False)
