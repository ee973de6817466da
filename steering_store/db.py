"""The SQLite database that says which versions exist. A version exists once its row is committed, and not before."""

from __future__ import annotations

import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from steering_store.errors import READ_ONLY, StoreBusy, StoreError, StoreFull, StoreReadOnly

BUSY_SECONDS = 30.0


def m001_artifacts_and_versions(db: sqlite3.Connection) -> None:
    """Names, and their versions. `last_version` only grows, so that a number is never given twice."""
    db.execute(
        "CREATE TABLE artifacts (name TEXT PRIMARY KEY, last_version INTEGER NOT NULL, created_at TEXT NOT NULL) STRICT"
    )
    db.execute(
        """
        CREATE TABLE versions (
            name TEXT NOT NULL REFERENCES artifacts (name),
            version INTEGER NOT NULL,
            digest TEXT NOT NULL,
            kind TEXT NOT NULL,
            manifest TEXT NOT NULL,
            created_at TEXT NOT NULL,
            PRIMARY KEY (name, version),
            UNIQUE (name, digest)
        ) STRICT
        """
    )


def m002_aliases_yanks_and_audit(db: sqlite3.Connection) -> None:
    """Aliases, and who did what to them and to versions. An audit entry outlives the version that it tells of."""
    db.execute("ALTER TABLE versions ADD COLUMN yanked_at TEXT")
    db.execute("ALTER TABLE versions ADD COLUMN yank_reason TEXT")
    db.execute(
        """
        CREATE TABLE audit (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            name TEXT NOT NULL REFERENCES artifacts (name),
            action TEXT NOT NULL,
            alias TEXT,
            from_version INTEGER,
            to_version INTEGER,
            at TEXT NOT NULL,
            actor TEXT,
            reason TEXT
        ) STRICT
        """
    )
    db.execute("CREATE INDEX audit_of_name ON audit (name, id)")
    db.execute(
        """
        CREATE TABLE aliases (
            name TEXT NOT NULL,
            alias TEXT NOT NULL,
            version INTEGER NOT NULL,
            moved_by INTEGER NOT NULL REFERENCES audit (id),
            PRIMARY KEY (name, alias),
            FOREIGN KEY (name, version) REFERENCES versions (name, version)
        ) STRICT
        """
    )


def m003_notes_and_versions_that_leave(db: sqlite3.Connection) -> None:
    """What callers say of themselves, beside who they are; and versions that are no more, whose files a lease needs."""
    db.execute("ALTER TABLE audit ADD COLUMN note TEXT")
    db.execute(
        """
        CREATE TABLE leaving (
            name TEXT NOT NULL,
            version INTEGER NOT NULL,
            digest TEXT NOT NULL,
            manifest TEXT NOT NULL,
            PRIMARY KEY (name, version)
        ) STRICT
        """
    )


def leases_m001(db: sqlite3.Connection) -> None:
    """Which digests somebody needs, and until when (seconds since the epoch)."""
    db.execute(
        """
        CREATE TABLE leases (
            digest TEXT NOT NULL,
            holder TEXT NOT NULL,
            expires_at REAL NOT NULL,
            PRIMARY KEY (digest, holder)
        ) STRICT
        """
    )


Migrations = tuple[Callable[[sqlite3.Connection], None], ...]
MIGRATIONS: Migrations = (
    m001_artifacts_and_versions,
    m002_aliases_yanks_and_audit,
    m003_notes_and_versions_that_leave,
)
LEASE_MIGRATIONS: Migrations = (leases_m001,)


def migrate(path: Path, migrations: Migrations = MIGRATIONS) -> None:
    """Create the database, or bring it up to date. Raises StoreError for one that a newer release has written."""
    # Two processes that switch one new file to WAL at once get "database is locked" without any waiting.
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with connect(path) as db:
            db.execute("PRAGMA journal_mode = WAL")
            current = db.execute("PRAGMA user_version").fetchone()[0]
            if current > len(migrations):
                raise StoreError(f"{path.name} is of schema {current}, from a newer polyhelm; upgrade this one")
            for number, migration in enumerate(migrations[current:], start=current + 1):
                with transaction(db):
                    migration(db)
                    db.execute(f"PRAGMA user_version = {number}")


@contextmanager
def connect(path: Path) -> Iterator[sqlite3.Connection]:
    """Open the database for one operation. Raises StoreBusy, StoreFull or StoreError for SQLite's own errors."""
    with sqlite_errors_named(path), closing(open_connection(path)) as db:
        yield db


def open_connection(path: Path, check_same_thread: bool = True) -> sqlite3.Connection:
    # Autocommit: transactions are opened by name below, never implicitly.
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=check_same_thread)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    return db


@contextmanager
def sqlite_errors_named(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into StoreBusy, StoreFull, StoreReadOnly or StoreError."""
    try:
        yield
    except sqlite3.Error as exc:
        raise _named(exc, path) from exc


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock from the first statement on: commit at the end, roll back on any error."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _named(exc: sqlite3.Error, path: Path) -> StoreError:
    # The low byte is the primary code; the others only say more about it. Errors of the Python module have none.
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreBusy(f"{path.name} was locked for {BUSY_SECONDS:.0f} s; try again")
    # Of its shared memory's file SQLite says no more than that it couldn't be written.
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _no_room(path)):
        return StoreFull("the store's disk is full; free some room and publish again")
    # Where the log of the last transactions isn't there, and can't be made, not even reading is possible.
    if code == sqlite3.SQLITE_READONLY or (code == sqlite3.SQLITE_CANTOPEN and not os.access(path.parent, os.W_OK)):
        return StoreReadOnly(READ_ONLY)
    return StoreError(f"{path.name}: {exc}; check the data directory, and restore it from a backup if it is damaged")


def _no_room(path: Path) -> bool:
    return shutil.disk_usage(path.parent).free < 1 << 16
