"""Keeps the artifacts of running requests from being deleted, by leases of this process in the store.

A lease is taken when an artifact is first needed and prolonged while a request runs with it, a few times a minute: most
requests write nothing. It ends with this process, or a little after the last request.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable

from starlette.concurrency import run_in_threadpool

from server.api.prepared import Prepared
from steering_store import Store
from steering_store.errors import StoreError, StoreReadOnly

log = logging.getLogger(__name__)

SECONDS = 30.0
"""How long a lease lasts that nobody prolongs."""


class Leases:
    """The leases of one API process. All methods are for its event loop."""

    def __init__(self, store: Store, seconds: float = SECONDS) -> None:
        self._store, self._seconds = store, seconds
        self._holder = f"requests of process {os.getpid()} on {platform.node()} ({uuid.uuid4().hex[:8]})"
        self._running: Counter[str] = Counter()
        self._ended: deque[frozenset[str]] = deque()
        self._until: dict[str, float] = {}
        self._task: asyncio.Task[None] | None = None

    async def hold(self, prepared: Prepared) -> None:
        """Keep the request's artifacts until its life ends. ArtifactNotFound where one is gone already."""
        self._running.update(prepared.digests)
        prepared.life.at_end(self._ended.append, prepared.digests)
        fresh = time.monotonic() + self._seconds / 2
        try:
            await self._take(digest for digest in prepared.digests if self._until.get(digest, 0) < fresh)
        except StoreReadOnly as error:
            # Nobody who sees the store as this process does can delete anything, so that there is nothing to hold.
            log.warning("an artifact is used without a lease: %s", error)
        except StoreError as error:
            error.param = "steering"
            raise

    def start(self) -> None:
        """Prolong from now on what running requests need."""
        self._task = asyncio.create_task(self._prolong())

    async def let_go(self) -> None:
        """Give back the leases that no running request needs, before something is deleted."""
        self._drain()
        for digest in [digest for digest in self._until if not self._running[digest]]:
            del self._until[digest]
            await run_in_threadpool(self._store.release, self._holder, digest)

    async def _prolong(self) -> None:
        while True:
            await asyncio.sleep(self._seconds / 3)
            self._drain()
            for digest in [digest for digest, until in self._until.items() if until < time.monotonic()]:
                del self._until[digest]
            try:
                await self._take(list(self._running))
            except StoreError as error:
                # The requests have read what they need; only a deletion meanwhile goes unhindered.
                log.warning("the artifacts of running requests can't be held: %s", error)

    async def _take(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._until[digest] = time.monotonic() + self._seconds
            try:
                await run_in_threadpool(self._store.lease, digest, self._holder, self._seconds)
            except BaseException:
                self._until.pop(digest, None)
                raise

    def _drain(self) -> None:
        while self._ended:
            self._running -= Counter(self._ended.popleft())
