"""Artifacts of running requests can't be deleted."""

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any

import pytest

from server.api.leases import Leases
from server.api.steering import Steerer
from steering_store import Store
from steering_store.errors import READ_ONLY, ArtifactNotFound, InUse, StoreReadOnly
from tests.server.api.published import prepare, publish

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_running_requests_artifact_cannot_be_deleted(steerer: Steerer, store: Store) -> None:
    publish(store)
    prepared: Any = prepare(steerer)
    await steerer.check(prepared)
    await steerer.leases.let_go()
    with pytest.raises(InUse, match="requests of process"):
        store.delete_version("mood", 1)
    followed = prepared.with_clean({})  # as in mode "frozen", where another takes its place
    del prepared
    gc.collect()
    await steerer.leases.let_go()
    with pytest.raises(InUse):
        store.delete_version("mood", 1)
    followed.life.end()
    await steerer.leases.let_go()
    store.delete_version("mood", 1)


async def test_a_request_that_nobody_ended_ends_when_nobody_holds_it(steerer: Steerer, store: Store) -> None:
    publish(store)
    prepared = prepare(steerer)
    await steerer.check(prepared)
    del prepared
    gc.collect()
    await steerer.leases.let_go()
    store.delete_version("mood", 1)


async def test_a_lease_lasts_as_long_as_its_request_and_little_longer(steerer: Steerer, store: Store) -> None:
    publish(store)
    leases = steerer.leases = Leases(store, seconds=0.6)
    leases.start()
    prepared = prepare(steerer)
    await steerer.check(prepared)
    await asyncio.sleep(1.5)
    with pytest.raises(InUse):
        store.delete_version("mood", 1)
    del prepared
    gc.collect()
    await asyncio.sleep(1.2)
    store.delete_version("mood", 1)


async def test_many_requests_take_one_lease(steerer: Steerer, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(store)
    taken: list[str] = []
    lease = store.lease
    monkeypatch.setattr(store, "lease", lambda digest, *rest: (taken.append(digest), lease(digest, *rest))[1])
    kept = [prepare(steerer) for _ in range(50)]
    await asyncio.gather(*(steerer.check(each) for each in kept))
    assert len(taken) == 1
    kept.pop()
    gc.collect()
    await steerer.leases.let_go()
    with pytest.raises(InUse):
        store.delete_version("mood", 1)


async def test_a_request_whose_artifact_is_gone_is_refused(steerer: Steerer, store: Store) -> None:
    publish(store)
    prepared = prepare(steerer)
    store.delete_version("mood", 1)
    with pytest.raises(ArtifactNotFound) as error:
        await steerer.check(prepared)
    assert error.value.param == "steering"


async def test_a_lease_that_can_not_be_prolonged_is_said_and_the_others_go_on(
    steerer: Steerer, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    digest = publish(store).digest
    leases = steerer.leases = Leases(store, seconds=0.3)
    prepared = prepare(steerer)
    await steerer.check(prepared)
    store.release(leases._holder)
    store.delete_version("mood", 1)
    with caplog.at_level(logging.WARNING):
        leases.start()
        await asyncio.sleep(0.5)
    assert digest in caplog.text
    assert leases._task is not None and not leases._task.done()


async def test_a_store_that_can_not_be_written_serves_without_a_lease_and_says_so(
    steerer: Steerer, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    publish(store)
    lease = store.lease

    def refuse(*_: object) -> None:
        raise StoreReadOnly(READ_ONLY)

    monkeypatch.setattr(store, "lease", refuse)
    with caplog.at_level(logging.WARNING):
        await steerer.check(prepare(steerer))
    assert "without a lease" in caplog.text
    monkeypatch.setattr(store, "lease", lease)
    prepared = prepare(steerer)
    await steerer.check(prepared)
    with pytest.raises(InUse):
        store.delete_version("mood", 1)
    del prepared
