"""Finds versions fast: a request that steers resolves its artifacts on the way in."""

from __future__ import annotations

import threading
import weakref
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
        self._seen = self._data_version()

    def get(self, key: str) -> T | None:
        """What was remembered under `key`, or None where it may be out of date."""
        with self._lock:
            version = self._data_version()
            if version != self._seen:
                self._known.clear()
                self._seen = version
            return self._known.get(key)

    def put(self, key: str, value: T, seen: int) -> None:
        """Remember what was read after `seen`; dropped when something was committed since."""
        with self._lock:
            if seen == self._seen and len(self._known) < LIMIT:
                self._known[key] = value

    @property
    def seen(self) -> int:
        """Ask for this before reading what is to be remembered."""
        return self._seen

    def _data_version(self) -> int:
        with sqlite_errors_named(self._path):
            (version,) = self._db.execute("PRAGMA data_version").fetchone()
        assert isinstance(version, int)
        return version
