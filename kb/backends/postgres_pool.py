"""Connections to PostgreSQL, and its errors as ours."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg.rows import dict_row

from kb.errors import KbBusy, KbError, KbFull, KbUnavailable

Connection = psycopg.Connection[dict[str, Any]]


class Pool:
    """Connections that threads take turns with."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._idle: list[Connection] = []
        self._lock = threading.Lock()

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Raises KbUnavailable, KbBusy, KbFull or KbError for PostgreSQL's own errors."""
        with errors_named():
            with self._lock:
                db = self._idle.pop() if self._idle else None
            db = db or psycopg.connect(self._url, autocommit=True, row_factory=dict_row)
            try:
                yield db
            finally:
                if db.closed or db.broken:
                    db.close()
                else:
                    with self._lock:
                        self._idle.append(db)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for db in idle:
            db.close()


@contextmanager
def errors_named() -> Iterator[None]:
    try:
        yield
    except (psycopg.errors.DiskFull, psycopg.errors.OutOfMemory) as exc:
        raise KbFull("the database's disk is full; free some room and send it again") from exc
    except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected, psycopg.errors.QueryCanceled) as exc:
        raise KbBusy(f"PostgreSQL gave up waiting ({exc}); try again") from exc
    except psycopg.OperationalError as exc:
        raise KbUnavailable(f"PostgreSQL can't be reached ({exc}); check POLYHELM_KB_URL") from exc
    except psycopg.Error as exc:
        raise KbError(f"PostgreSQL: {exc}") from exc
