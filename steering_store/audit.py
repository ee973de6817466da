"""The audit trail: written in the transaction of what it tells of."""

from __future__ import annotations

import sqlite3
from datetime import UTC, datetime

from steering_store.records import AuditEntry


def record(
    db: sqlite3.Connection,
    name: str,
    action: str,
    *,
    alias: str | None = None,
    before: int | None = None,
    after: int | None = None,
    by: str | None,
    reason: str | None,
) -> int:
    """Add an entry, and return its number, which is higher than any before it."""
    query = """
        INSERT INTO audit (name, action, alias, from_version, to_version, at, actor, reason)
        VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id
    """
    now = datetime.now(UTC).isoformat()
    number: int = db.execute(query, (name, action, alias, before, after, now, by, reason)).fetchone()[0]
    return number


def entries(db: sqlite3.Connection, name: str, alias: str | None = None) -> list[AuditEntry]:
    """The entries of an artifact, or of one of its aliases, oldest first."""
    query = "SELECT * FROM audit WHERE name = ?1 AND (?2 IS NULL OR alias = ?2) ORDER BY id"
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
            row["reason"],
        )
        for row in db.execute(query, (name, alias))
    ]
