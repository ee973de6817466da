"""Garbage collection: mark what the versions need, sweep the rest of the files once it is old enough.

A publication puts its blobs in place and its version into the database in one transaction, and the sweep marks and
removes in another, so that SQLite's write lock keeps them apart: no blob is taken between the one and the other. The
grace period is not what makes this safe; it is the time in which a backup of the database can still be restored.
"""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass

from steering_store.blobs import Blobs
from steering_store.db import transaction
from steering_store.errors import CorruptArtifact
from steering_store.leases import Leases
from steering_store.manifest import read_manifest
from steering_store.records import version_of

GRACE_SECONDS = 86400.0


@dataclass(frozen=True)
class Garbage:
    """What nobody needs: digests (hex) of blobs, names of files in `tmp/`, and how many bytes they are together.

    Removed, unless `dry_run`.
    """

    blobs: list[str]
    tmp: list[str]
    size: int
    dry_run: bool


def collect(blobs: Blobs, leases: Leases, *, grace_seconds: float, dry_run: bool) -> Garbage:
    """Sweep, or with `dry_run` tell what would be swept. Raises CorruptArtifact for a manifest that can't be trusted to
    tell what it needs; then nothing was removed."""
    oldest = time.time() - grace_seconds
    candidates = {sha256: found.st_size for sha256, found in blobs.all() if found.st_mtime <= oldest}
    with leases.with_versions() as db:
        if dry_run:
            garbage = sorted(candidates.keys() - _needed(db))
        else:
            with transaction(db):
                garbage = sorted(candidates.keys() - _needed(db))
                for sha256 in garbage:
                    blobs.remove(sha256)
                leases.drop_expired(db)
    tmp = blobs.sweep(oldest, dry_run=dry_run)
    size = sum(candidates[sha256] for sha256 in garbage) + sum(found for _, found in tmp)
    return Garbage(garbage, [path.name for path, _ in tmp], size, dry_run)


def begin_grace(blobs: Blobs, row: sqlite3.Row) -> None:
    """Let the grace period of a version's files begin now; call it where the version is deleted."""
    try:
        files = version_of(row).manifest.files
    except CorruptArtifact:
        # Deleting a damaged row is how one gets rid of it; it can't be trusted to tell its files.
        return
    for entry in files:
        blobs.refresh(entry.sha256)


def _needed(db: sqlite3.Connection) -> set[str]:
    """The digests (hex) of all files of all versions, and of those that a lease outlives."""
    needed: set[str] = set()
    for row in db.execute("SELECT * FROM versions"):
        needed.update(entry.sha256 for entry in version_of(row).manifest.files)
    for row in db.execute("SELECT digest, manifest FROM leaving"):
        if Leases.held(db, row["digest"]):
            needed.update(entry.sha256 for entry in read_manifest(row["manifest"]).files)
    return needed
