"""Leases: while one is held, no version with its digest can be deleted, and so none of its files swept.

They lie in a database of their own, beside the versions': a lease taken or given back must not make every process
forget what it remembers of the versions, and needs no fsync, since no lease outlives a power cut. A transaction that is
begun on both holds the write lock of both, so that no version is deleted while a lease on it is being taken.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from steering_store.db import LEASE_MIGRATIONS, connect, migrate, transaction
from steering_store.errors import ArtifactNotFound


@dataclass(frozen=True)
class Lease:
    """A digest that `holder` needs until `expires_at` (seconds since the epoch): its death holds nothing forever."""

    digest: str
    holder: str
    expires_at: float


class Leases:
    """The file `leases.sqlite` beside the database of the versions. Safe to use from several threads and processes."""

    def __init__(self, versions: Path) -> None:
        self._versions = versions
        self._path = versions.with_name("leases.sqlite")
        migrate(self._path, LEASE_MIGRATIONS)

    def take(self, digest: str, holder: str, seconds: float) -> Lease:
        """Hold a digest, or hold it for longer. Raises ArtifactNotFound."""
        with self.with_versions() as db, transaction(db):
            known = "SELECT 1 FROM versions WHERE digest = ?1 UNION ALL SELECT 1 FROM leaving WHERE digest = ?1"
            if db.execute(known, (digest,)).fetchone() is None:
                raise ArtifactNotFound(f"no version has the digest {digest}; resolve the artifact again", "digest")
            lease = Lease(digest, holder, time.time() + seconds)
            db.execute(
                "INSERT INTO leases.leases VALUES (?, ?, ?) ON CONFLICT (digest, holder) "
                "DO UPDATE SET expires_at = max(expires_at, excluded.expires_at)",
                (lease.digest, lease.holder, lease.expires_at),
            )
        return lease

    def release(self, holder: str, digest: str | None) -> None:
        """End one lease of a holder, or all."""
        with self._alone() as db:
            db.execute("DELETE FROM leases WHERE holder = ?1 AND (?2 IS NULL OR digest = ?2)", (holder, digest))

    @contextmanager
    def _alone(self) -> Iterator[sqlite3.Connection]:
        with connect(self._path) as db:
            db.execute("PRAGMA synchronous = NORMAL")
            yield db

    @contextmanager
    def with_versions(self) -> Iterator[sqlite3.Connection]:
        """The versions' database, with this one attached as `leases`."""
        with connect(self._versions) as db:
            db.execute("ATTACH DATABASE ? AS leases", (str(self._path),))
            db.execute("PRAGMA leases.synchronous = NORMAL")
            yield db

    @staticmethod
    def held(db: sqlite3.Connection, digest: str) -> bool:
        """Whether anybody holds a digest now; `db` is a connection of `with_versions`."""
        query = "SELECT 1 FROM leases.leases WHERE digest = ? AND expires_at > ?"
        return db.execute(query, (digest, time.time())).fetchone() is not None

    @staticmethod
    def drop_expired(db: sqlite3.Connection) -> None:
        """Forget the leases that have run out, and versions that only they kept; `db` is as above."""
        db.execute("DELETE FROM leases.leases WHERE expires_at <= ?", (time.time(),))
        db.execute("DELETE FROM leaving WHERE digest NOT IN (SELECT digest FROM leases.leases)")
