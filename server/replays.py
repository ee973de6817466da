"""Answers by Idempotency-Key: a request that is sent again within a day is answered as it was, and does nothing.

An answer is kept when the work is done. A server that dies in between does the work again when it is asked again, which
for facts changes nothing: what is the same stays.
"""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

from kb.backends.sqlite.database import Database, transaction
from kb.errors import KeyReused

KEPT_SECONDS = 24 * 3600.0


class Replay(NamedTuple):
    request: str
    status: int
    body: bytes


class Replays:
    """A SQLite file that any number of processes share."""

    def __init__(self, path: Path) -> None:
        self._db = Database(path, (_m001_replays,))

    def get(self, scope: str, key: str) -> Replay | None:
        """The answer kept under a key, whatever the request was."""
        with self._db.connection() as db:
            sql = "SELECT request, status, body FROM replays WHERE scope = ? AND key = ? AND at > ?"
            row = db.execute(sql, (scope, key, time.time() - KEPT_SECONDS)).fetchone()
        return None if row is None else Replay(*row)

    def find(self, scope: str, key: str, request: str) -> Replay | None:
        """The answer to a request, by the SHA-256 (hex) of its body. Raises KeyReused where that was another."""
        known = self.get(scope, key)
        if known is not None and known.request != request:
            raise KeyReused(
                f"Idempotency-Key {key!r} came with another body before; use a new key for a new request",
                "Idempotency-Key",
            )
        return known

    def put(self, scope: str, key: str, request: str, status: int, body: bytes) -> None:
        now = time.time()
        with self._db.connection() as db, transaction(db):
            db.execute("DELETE FROM replays WHERE at <= ?", (now - KEPT_SECONDS,))
            db.execute(
                "INSERT OR REPLACE INTO replays VALUES (?, ?, ?, ?, ?, ?)", (scope, key, request, status, body, now)
            )

    def close(self) -> None:
        self._db.close()


def _m001_replays(db: sqlite3.Connection) -> None:
    db.execute(
        """
        CREATE TABLE replays (
            scope TEXT NOT NULL,
            key TEXT NOT NULL,
            request TEXT NOT NULL,
            status INTEGER NOT NULL,
            body BLOB NOT NULL,
            at REAL NOT NULL,
            PRIMARY KEY (scope, key)
        ) STRICT
        """
    )
