from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steering_store import Store, db
from steering_store.db import connect, transaction
from steering_store.errors import ArtifactNotFound, InUse, StoreBusy
from steering_store.leases import Leases

Content = dict[str, Any]
Vectors = Callable[..., dict[str, bytes]]


@pytest.fixture
def digest(store: Store, manifest: Content, vectors: Vectors) -> str:
    return store.publish("mood", manifest, vectors()).version.digest


def test_lease_holds_until_it_is_released(store: Store, digest: str) -> None:
    for holder in ("a", "b"):
        store.lease(digest, holder, 60)
    store.release("a", digest)
    with pytest.raises(InUse, match="lease of b"):
        store.delete_version("mood", 1)
    store.release("b")
    store.release("b", digest)
    store.delete_version("mood", 1)


def test_lease_of_the_dead_runs_out(store: Store, digest: str) -> None:
    lease = store.lease(digest, "killed", 0.05)
    with pytest.raises(InUse):
        store.delete_version("mood", 1)
    time.sleep(max(0.0, lease.expires_at - time.time()) + 0.01)
    store.delete_version("mood", 1)


def test_leasing_again_prolongs_and_never_shortens(store: Store, digest: str) -> None:
    store.lease(digest, "server", 0.2)
    store.lease(digest, "server", 60)
    store.lease(digest, "server", 0.01)
    time.sleep(0.25)
    with pytest.raises(InUse):
        store.delete_version("mood", 1)


def test_nobody_leases_what_is_gone(store: Store, digest: str) -> None:
    store.delete_version("mood", 1)
    with pytest.raises(ArtifactNotFound, match=digest):
        store.lease(digest, "late", 60)


def test_lease_makes_nobody_forget_what_was_resolved(store: Store, digest: str) -> None:
    found = store.resolve("mood")
    store.lease(digest, "server", 60)
    store.lease(digest, "server", 120)
    store.release("server")
    assert store.resolve("mood") is found
    store.yank("mood", 1)
    assert store.resolve("mood@1") is not found


def test_transaction_on_both_databases_locks_both(
    store: Store, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps a deletion from coming between the look at the versions and the lease."""
    versions = tmp_path / "artifacts" / "store.sqlite"
    monkeypatch.setattr(db, "BUSY_SECONDS", 0.05)
    with Leases(versions).with_versions() as both, transaction(both):
        for path in (versions, versions.with_name("leases.sqlite")):
            with pytest.raises(StoreBusy), connect(path) as other, transaction(other):
                pass
