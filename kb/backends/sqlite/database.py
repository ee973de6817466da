"""The SQLite database that holds all facts of a folder. A write exists once it is committed, and not before."""

from __future__ import annotations

import errno
import fcntl
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from kb.errors import KbBusy, KbError, KbFull, KbUnavailable

READ_ONLY = "the folder of the knowledge base is read-only for this process; let it be written, and send it again"
BUSY_SECONDS = 30.0
PAGE_BYTES = 8192
"""Five vectors of 384 numbers to a page; SQLite's own 4096 hold two and waste a quarter."""
NUMBER_BITS = 40
"""Rows of `facts` and `vectors` are numbered collection << NUMBER_BITS | fact, so that a collection is one range."""


def m001_collections_and_facts(db: sqlite3.Connection) -> None:
    db.execute(
        """
        CREATE TABLE collections (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            uid TEXT NOT NULL UNIQUE,
            name TEXT NOT NULL UNIQUE,
            encoder TEXT NOT NULL,
            dimension INTEGER NOT NULL,
            encoder_digest TEXT NOT NULL,
            conflicts TEXT NOT NULL,
            created_at TEXT NOT NULL,
            last_seq INTEGER NOT NULL DEFAULT 0,
            last_number INTEGER NOT NULL DEFAULT 0
        ) STRICT
        """
    )
    db.execute(
        """
        CREATE TABLE facts (
            key INTEGER PRIMARY KEY,
            collection INTEGER NOT NULL REFERENCES collections (id),
            id TEXT NOT NULL,
            version INTEGER NOT NULL,
            seq INTEGER NOT NULL,
            deleted INTEGER NOT NULL,
            superseded_by TEXT,
            content_hash TEXT NOT NULL,
            key_hash BLOB NOT NULL,
            text TEXT NOT NULL,
            question TEXT,
            answer TEXT,
            language TEXT,
            subject TEXT,
            relation TEXT,
            object TEXT,
            aliases TEXT NOT NULL,
            source TEXT,
            valid_from TEXT,
            valid_to TEXT,
            metadata TEXT NOT NULL,
            created_at TEXT NOT NULL,
            updated_at TEXT NOT NULL,
            UNIQUE (collection, id)
        ) STRICT
        """
    )
    db.execute("CREATE UNIQUE INDEX facts_by_seq ON facts (collection, seq, deleted)")
    db.execute("CREATE INDEX facts_by_content ON facts (collection, content_hash) WHERE NOT deleted")
    db.execute("CREATE INDEX facts_by_key ON facts (collection, key_hash) WHERE NOT deleted")
    db.execute(
        "CREATE INDEX facts_by_subject ON facts (collection, subject, relation) "
        "WHERE NOT deleted AND subject IS NOT NULL AND relation IS NOT NULL"
    )
    # A snapshot that was made before a backup was put back must not pass for one of what was written since.
    db.execute(
        """
        CREATE TABLE writes (
            collection INTEGER NOT NULL,
            seq INTEGER NOT NULL,
            token TEXT NOT NULL,
            PRIMARY KEY (collection, seq)
        ) STRICT, WITHOUT ROWID
        """
    )
    db.execute("CREATE TABLE vectors (key INTEGER PRIMARY KEY REFERENCES facts (key), vector BLOB NOT NULL) STRICT")
    db.execute(
        """
        CREATE TABLE revisions (
            collection INTEGER NOT NULL,
            id TEXT NOT NULL,
            version INTEGER NOT NULL,
            fact TEXT NOT NULL,
            PRIMARY KEY (collection, id, version)
        ) STRICT
        """
    )


def m002_facts_by_language(db: sqlite3.Connection) -> None:
    # All that a search for the facts in a language reads, so that it needn't touch the facts of the others.
    db.execute("CREATE INDEX facts_by_language ON facts (collection, language, deleted, valid_from, valid_to)")


def m003_vectors_of_deleted_facts(db: sqlite3.Connection) -> None:
    # They stay, so that a text that comes again needn't be encoded again.
    db.execute("DROP INDEX facts_by_key")
    db.execute("CREATE INDEX facts_by_key ON facts (collection, key_hash)")


Migrations = tuple[Callable[[sqlite3.Connection], None], ...]
MIGRATIONS: Migrations = (m001_collections_and_facts, m002_facts_by_language, m003_vectors_of_deleted_facts)


class Database:
    """A file, and connections to it that threads take turns with: to open one costs more than most queries."""

    def __init__(self, path: Path, migrations: Migrations = MIGRATIONS) -> None:
        """Create the file, or bring it up to date. Raises KbError for one that a newer release has written."""
        self.path = path
        self._idle: list[sqlite3.Connection] = []
        self._lock = threading.Lock()
        self._closed = False
        with errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._migrate(migrations)

    @contextmanager
    def connection(self) -> Iterator[sqlite3.Connection]:
        """A connection that nobody else has meanwhile. Raises KbBusy, KbFull or KbError for SQLite's own errors."""
        with errors_named(self.path):
            with self._lock:
                db = self._idle.pop() if self._idle else None
            db = db or _connect(self.path)
            try:
                yield db
            finally:
                with self._lock:
                    keep = not self._closed and not db.in_transaction
                    if keep:
                        self._idle.append(db)
                if not keep:
                    db.close()

    def close(self) -> None:
        """Close what is idle; what is at work closes when it is done."""
        with self._lock:
            idle, self._idle, self._closed = self._idle, [], True
        for db in idle:
            db.close()

    def _migrate(self, migrations: Migrations) -> None:
        # Two processes that switch one new file to WAL at once get "database is locked" without any waiting.
        with self.path.with_suffix(".lock").open("w") as lock, closing(_connect(self.path)) as db:
            fcntl.flock(lock, fcntl.LOCK_EX)
            db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
            db.execute("PRAGMA journal_mode = WAL")
            current = db.execute("PRAGMA user_version").fetchone()[0]
            if current > len(migrations):
                raise KbError(f"{self.path.name} is of schema {current}, from a newer polyhelm; upgrade this one")
            for number, migration in enumerate(migrations[current:], start=current + 1):
                with transaction(db):
                    migration(db)
                    db.execute(f"PRAGMA user_version = {number}")


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """Hold the write lock from the first statement on: commit at the end, roll back on any error."""
    with _ended(db, "BEGIN IMMEDIATE"):
        yield


@contextmanager
def one_moment(db: sqlite3.Connection) -> Iterator[None]:
    """Read everything as of one moment, whatever others write meanwhile."""
    with _ended(db, "BEGIN"):
        yield


@contextmanager
def _ended(db: sqlite3.Connection, begin: str) -> Iterator[None]:
    db.execute(begin)
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Turn the errors of SQLite, and those of a disk that takes no more, into ours."""
    try:
        yield
    except sqlite3.Error as exc:
        raise _named(exc, path) from exc
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise KbFull("the disk of the knowledge base is full; free some room and send it again") from exc
        if exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise KbUnavailable(READ_ONLY) from exc
        raise


def _connect(path: Path) -> sqlite3.Connection:
    # Autocommit: transactions are opened by name above, never implicitly.
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    return db


def _named(exc: sqlite3.Error, path: Path) -> KbError:
    # The low byte is the primary code; the others only say more about it. Errors of the Python module have none.
    code = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return KbBusy(f"{path.name} was locked for {BUSY_SECONDS:.0f} s; try again")
    # Of its shared memory's file SQLite says no more than that it couldn't be written.
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR and _no_room(path)):
        return KbFull("the disk of the knowledge base is full; free some room and send it again")
    if code == sqlite3.SQLITE_READONLY:
        return KbUnavailable(READ_ONLY)
    return KbError(f"{path.name}: {exc}; check the data directory, and restore it from a backup if it is damaged")


def _no_room(path: Path) -> bool:
    return shutil.disk_usage(path.parent).free < 1 << 16
