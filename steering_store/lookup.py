"""Finds versions fast: a request that steers resolves its artifacts on the way in."""

from __future__ import annotations

import sqlite3
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from steering_store.db import open_connection, sqlite_errors_named

T = TypeVar("T")
LIMIT = 4096


class Remembered(Generic[T]):
    """What was read from the database, kept until any connection of any process commits to it.

    SQLite's `data_version` says whether one has, in a few microseconds instead of a query and the parsing of a
    manifest. Holds one connection for its lifetime; safe to use from several threads.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, T] = {}
        with sqlite_errors_named(path):
            self._db = open_connection(path, check_same_thread=False)
        weakref.finalize(self, self._db.close)
        self._seen = -1

    def get(self, key: str, read: Callable[[sqlite3.Connection], T]) -> T:
        """What is remembered under `key`, or else what `read` finds now."""
        with self._lock, sqlite_errors_named(self._path):
            # Asked before reading: what is committed in between is at worst read twice.
            (version,) = self._db.execute("PRAGMA data_version").fetchone()
            if version != self._seen:
                self._known.clear()
                self._seen = version
            if key not in self._known:
                found = read(self._db)
                if len(self._known) >= LIMIT:
                    self._known.clear()
                self._known[key] = found
            return self._known[key]
