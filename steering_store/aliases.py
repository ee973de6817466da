"""Aliases: names of versions that move, each move compared with what the mover had seen, and written down."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from datetime import datetime
from typing import Unpack

from steering_store import audit
from steering_store.audit import Stated
from steering_store.errors import ArtifactNotFound, PreconditionFailed, Yanked
from steering_store.records import find_row
from steering_store.reference import Reference

ABSENT = "absent"
"""In place of an etag: the alias must not exist."""


@dataclass(frozen=True)
class Alias:
    """A movable name of a version. Every move gives it another `etag`, also one back to an earlier version.

    `moved_at` (UTC), `by`, `note` and `reason` tell of the last move.
    """

    name: str
    alias: str
    version: int
    etag: str
    moved_at: datetime
    by: str | None
    note: str | None
    reason: str | None


_SELECT = """
    SELECT aliases.name, aliases.alias, version, moved_by, at, actor, note, reason
    FROM aliases JOIN audit ON audit.id = moved_by WHERE aliases.name = ?
"""


def of_artifact(db: sqlite3.Connection, name: str, *, after: str = "", limit: int = -1) -> list[Alias]:
    """The aliases of an artifact, in order: those behind `after`, and at most `limit` of them."""
    query = _SELECT + " AND aliases.alias > ? ORDER BY aliases.alias LIMIT ?"
    return [_alias(row) for row in db.execute(query, (name, after, limit))]


def find(db: sqlite3.Connection, name: str, alias: str) -> Alias | None:
    """One alias, or None."""
    row = db.execute(_SELECT + " AND aliases.alias = ?", (name, alias)).fetchone()
    return None if row is None else _alias(row)


def move(
    db: sqlite3.Connection, name: str, alias: str, version: int, *, expected: str | None, **stated: Unpack[Stated]
) -> Alias:
    """Point an alias at a version, in the caller's transaction; to where it points already changes nothing.

    Raises ArtifactNotFound, Yanked or PreconditionFailed.
    """
    target = find_row(db, Reference(name, version))
    before = find(db, name, alias)
    _check_expected(before, name, alias, expected)
    if before is not None and before.version == version:
        return before
    if target["yanked_at"] is not None:
        raise Yanked(f"version: {name}@{version} was yanked; unyank it first, or choose another", "version")
    number = audit.record(
        db, name, "set_alias", alias=alias, before=before.version if before else None, after=version, **stated
    )
    db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?)", (name, alias, version, number))
    after = find(db, name, alias)
    assert after is not None
    return after


def remove(db: sqlite3.Connection, name: str, alias: str, *, expected: str | None, **stated: Unpack[Stated]) -> None:
    """Delete an alias, in the caller's transaction. Raises ArtifactNotFound or PreconditionFailed."""
    before = find(db, name, alias)
    if before is None and expected is None:
        raise ArtifactNotFound(f"no alias {alias!r} of {name!r}; list its aliases to see which there are", "alias")
    _check_expected(before, name, alias, expected)
    if before is not None:
        audit.record(db, name, "delete_alias", alias=alias, before=before.version, **stated)
        db.execute("DELETE FROM aliases WHERE name = ? AND alias = ?", (name, alias))


def _check_expected(found: Alias | None, name: str, alias: str, expected: str | None) -> None:
    current = None if found is None else found.etag
    if expected is None or expected == (current or ABSENT):
        return
    state = f"points at version {found.version}, etag {current}" if found else "doesn't exist"
    raise PreconditionFailed(
        f"alias {name}@{alias} {state}, and the caller expected {expected}; read it again and decide anew",
        "alias",
        current=current,
    )


def _alias(row: sqlite3.Row) -> Alias:
    return Alias(
        row["name"],
        row["alias"],
        row["version"],
        f"{row['version']}-{row['moved_by']}",
        datetime.fromisoformat(row["at"]),
        row["actor"],
        row["note"],
        row["reason"],
    )
