"""The audit trail: written in the transaction of what it tells of."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime
from typing import TypedDict, Unpack

from steering_store.records import AuditEntry


class Stated(TypedDict, total=False):
    """Who changes something (`by`), what that caller says of itself besides, and why."""

    by: str | None
    note: str | None
    reason: str | None


def record(
    db: sqlite3.Connection,
    name: str,
    action: str,
    *,
    alias: str | None = None,
    before: int | None = None,
    after: int | None = None,
    **stated: Unpack[Stated],
) -> int:
    """Add an entry, and return its number, which is higher than any before it."""
    query = """
        INSERT INTO audit (name, action, alias, from_version, to_version, at, actor, note, reason)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING id
    """
    now = datetime.now(UTC).isoformat()
    said = (stated.get("by"), stated.get("note"), stated.get("reason"))
    number: int = db.execute(query, (name, action, alias, before, after, now, *said)).fetchone()[0]
    return number


def entries(
    db: sqlite3.Connection, name: str, alias: str | None = None, *, after: int = 0, limit: int = -1
) -> list[AuditEntry]:
    """The entries of an artifact, or of one of its aliases, oldest first: those behind the number `after`, and at most
    `limit` of them."""
    query = "SELECT * FROM audit WHERE name = ?1 AND (?2 IS NULL OR alias = ?2) AND id > ?3 ORDER BY id LIMIT ?4"
    return [
        AuditEntry(
            row["id"],
            row["name"],
            row["action"],
            row["alias"],
            row["from_version"],
            row["to_version"],
            datetime.fromisoformat(row["at"]),
            row["actor"],
            row["note"],
            row["reason"],
        )
        for row in db.execute(query, (name, alias, after, limit))
    ]
