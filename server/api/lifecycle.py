"""How the server ends: on SIGTERM once its running requests have, and at once when its engine is dead.

vLLM's servers, ours included, end by closing the engine and then the HTTP server. So the drain is put before the close
of the engine: nothing new begins, what runs ends with its receipt, and only then the engine goes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI

from server import connections, metrics
from server.api.admission import Load

if TYPE_CHECKING:
    from server.engine.client import Engine

log = logging.getLogger(__name__)

WATCH_SECONDS = 0.5
LAST_WORDS_SECONDS = 5.0
"""What requests get to tell their clients that the engine is dead."""


class Lifecycle:
    """Of one API process. Belongs to its event loop, but for `_shutdown`."""

    def __init__(self, engine: Engine, load: Load, drain_seconds: float) -> None:
        self.engine_died = False
        self._engine, self._load, self._drain_seconds = engine, load, drain_seconds
        self._loop = asyncio.get_running_loop()
        self._close: Callable[..., None] = engine.client.shutdown
        engine.client.shutdown = self._shutdown  # type: ignore[method-assign]

    def install(self, app: FastAPI, limits: connections.HeaderLimits) -> None:
        """Watch the engine, and the connections' headers, while the app serves."""
        inner = app.router.lifespan_context

        @asynccontextmanager
        async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
            # vLLM puts it there before it serves.
            server = getattr(app.state, "server", None)
            if server is not None:
                connections.limit(server.config, limits)
            watcher = asyncio.create_task(self._watch(server))
            try:
                async with inner(app) as state:
                    yield state
            finally:
                watcher.cancel()

        app.router.lifespan_context = lifespan

    def drain(self) -> None:
        """Take nothing new from now on."""
        if not self._load.draining:
            self._load.draining = True
            metrics.DRAINING.set(1)
            log.info("draining: %d requests run", self._load.requests)

    def _shutdown(self, timeout: float | None = None) -> None:
        """The engine client's `shutdown`: vLLM calls it in a thread when a signal ends the server."""
        started = time.monotonic()
        # vLLM's own handlers end the server too when they meet a dead engine, and may be the first to.
        self._note_death()
        if self._loop.is_running() and not self.engine_died:
            self._loop.call_soon_threadsafe(self.drain)
            if self._in_a_thread():
                self._wait_until_idle()
        left = None if timeout is None else max(timeout - (time.monotonic() - started), 1.0)
        # Before it refuses anything: a fit that it cuts off goes on at the next start, and hasn't failed.
        self._engine.closed = True
        if self._load.draining and not self._load.requests:
            self._engine.stop_reading()
        self._close(timeout=left)

    def _note_death(self) -> None:
        if not self.engine_died and not self._engine.closed and not self._engine.alive:
            self.engine_died = True
            log.critical("the engine has died: this process ends, so that its supervisor can start another")

    def _in_a_thread(self) -> bool:
        try:
            return asyncio.get_running_loop() is not self._loop
        except RuntimeError:
            return True

    def _wait_until_idle(self) -> None:
        async def idle() -> None:
            try:
                async with asyncio.timeout(self._drain_seconds):
                    await self._load.idle.wait()
            except TimeoutError:
                log.warning("%d requests still ran after %g s of draining", self._load.requests, self._drain_seconds)

        asyncio.run_coroutine_threadsafe(idle(), self._loop).result()

    async def _watch(self, server: Any) -> None:
        while self._engine.alive:
            await asyncio.sleep(WATCH_SECONDS)
        self._note_death()
        if not self.engine_died:
            return  # it was closed
        try:
            async with asyncio.timeout(LAST_WORDS_SECONDS):
                await self._load.idle.wait()
        except TimeoutError:
            log.warning("%d requests wait for a dead engine: their connections are closed", self._load.requests)
        if server is not None:
            server.should_exit = server.force_exit = True
