"""The index of one collection in this process: loaded when it is first searched, and level with the facts ever after.

Before each search the number of the collection's last write is compared with the index's own, and what it lacks is read
from SQLite, whichever process wrote it.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kb import snapshots
from kb.backends.base import CollectionInfo
from kb.backends.sqlite.database import NUMBER_BITS, Database, errors_named, one_moment
from kb.errors import CollectionNotFound, KbError
from kb.index import Found, IndexOptions, VectorIndex
from kb.locks import ReadWriteLock

log = logging.getLogger(__name__)
_CHUNK = 4096
_MASK = (1 << NUMBER_BITS) - 1


class LiveIndex:
    """Safe to use from several threads."""

    def __init__(self, db: Database, info: CollectionInfo, collection: int, path: Path, options: IndexOptions) -> None:
        self._db, self._info, self._collection, self._path, self._options = db, info, collection, path, options
        self._index: VectorIndex | None = None
        # Held to change which index is used, and to bring it up to date; searches hold the second one to read.
        self._updating = threading.Lock()
        self._lock = ReadWriteLock()
        self._starting = threading.Lock()
        self._upkeep: threading.Thread | None = None
        self._snapshot_seq = 0
        self._source = "facts"

    @property
    def loaded(self) -> bool:
        return self._index is not None

    def search(self, queries: np.ndarray, k: int, allowed: np.ndarray | None = None) -> Found:
        """The nearest of all that was acknowledged before the call; see `VectorIndex.search`."""
        self.sync()
        with self._lock.reading():
            return self._loaded().search(queries, k, allowed)

    def sync(self) -> None:
        """Read what the index lacks. Raises CollectionNotFound."""
        with self._db.connection() as db:
            if self._index is not None and self._index.last_seq == self._last_seq(db):
                return
            with self._updating, one_moment(db):
                last = self._last_seq(db)
                if self._index is None:
                    self._index = self._load(db, last)
                self._replay(db, self._index, last)
        self._tend()

    def snapshot(self) -> dict[str, Any]:
        """Keep the index as it is now. Raises KbFull."""
        self.sync()
        with self._lock.reading():
            packed = snapshots.pack(self._loaded())
        with self._db.connection() as db:
            made_from = self._made_from(db, packed.header["last_seq"])
        with errors_named(self._path):
            size = snapshots.write(self._path, packed, made_from)
        self._snapshot_seq = packed.header["last_seq"]
        return {"last_seq": self._snapshot_seq, "facts": packed.header["facts"], "bytes": size}

    def rebuild(self) -> dict[str, Any]:
        """Make the index anew while the old one is searched, then change over."""
        with self._db.connection() as db:
            with one_moment(db):
                index = self._build(db, self._last_seq(db))
            with self._updating, one_moment(db):
                self._replay(db, index, self._last_seq(db))
                with self._lock.writing():
                    self._index, self._source = index, "facts"
        self._snapshot_seq = 0
        return self.describe()

    def describe(self) -> dict[str, Any]:
        """Of the index in this process: its kind, and how much it holds; None where it isn't loaded."""
        index = self._index
        if index is None:
            return {"loaded": False}
        return {
            "loaded": True,
            "kind": index.kind,
            "facts": index.facts,
            "dead": index.dead,
            "last_seq": index.last_seq,
            "made_from": self._source,
        }

    def settle(self) -> None:
        """Wait for what goes on in the background."""
        if self._upkeep is not None:
            self._upkeep.join()

    def _loaded(self) -> VectorIndex:
        assert self._index is not None
        return self._index

    def _last_seq(self, db: sqlite3.Connection) -> int:
        row = db.execute("SELECT last_seq FROM collections WHERE id = ?", (self._collection,)).fetchone()
        if row is None:
            raise CollectionNotFound(f"collection {self._info.name!r} was deleted meanwhile", "collection")
        return int(row[0])

    def _load(self, db: sqlite3.Connection, last: int) -> VectorIndex:
        try:
            index = snapshots.read(self._path, self._made_from(db, None), self._options)
        except FileNotFoundError:
            return self._build(db, last)
        except (snapshots.BadSnapshot, RuntimeError, OSError) as exc:  # FAISS's own errors are RuntimeErrors
            log.warning("%s: snapshot %s not used: %s; making the index from the facts", *self._names, exc)
            return self._build(db, last)
        token = self._made_from(db, index.last_seq)["token"]
        if token is None or token != index.token:
            log.warning("%s: snapshot %s is of other writes than the facts; making the index from them", *self._names)
            return self._build(db, last)
        self._snapshot_seq, self._source = index.last_seq, "snapshot"
        return index

    @property
    def _names(self) -> tuple[str, str]:
        return self._info.name, self._path.name

    def _made_from(self, db: sqlite3.Connection, seq: int | None) -> dict[str, Any]:
        """What a snapshot must agree with; with `seq`, also the token of the transaction that ended there."""
        made_from: dict[str, Any] = {"collection": self._info.uid, "encoder": list(self._info.encoder)}
        if seq is None:
            return made_from
        sql = "SELECT token FROM writes WHERE collection = ? AND seq = ?"
        row = db.execute(sql, (self._collection, seq)).fetchone()
        return made_from | {"token": "" if seq == 0 else row[0] if row else None}

    def _build(self, db: sqlite3.Connection, last: int) -> VectorIndex:
        start = time.perf_counter()
        span = (self._collection << NUMBER_BITS, (self._collection + 1) << NUMBER_BITS)
        sql = "SELECT count(*) FROM facts WHERE collection = ? AND NOT deleted"
        count = db.execute(sql, (self._collection,)).fetchone()[0]
        numbers, seqs = np.empty(count, np.int64), np.empty(count, np.int64)
        vectors = np.empty((count, self._info.encoder.dimension), np.float32)
        sql = (
            "SELECT key, seq, vector FROM vectors JOIN facts USING (key) "
            "WHERE key >= ? AND key < ? AND NOT deleted ORDER BY key"
        )
        for position, (key, seq, vector) in enumerate(db.execute(sql, span)):
            numbers[position], seqs[position] = key & _MASK, seq
            vectors[position] = np.frombuffer(vector, "<f4")
        index = VectorIndex.build(self._info.encoder.dimension, self._options, numbers, seqs, vectors)
        index.last_seq = last
        self._source = "facts"
        log.info("%s: index of %d facts made in %.2f s", self._info.name, count, time.perf_counter() - start)
        return index

    def _replay(self, db: sqlite3.Connection, index: VectorIndex, last: int) -> None:
        if index.last_seq == last:
            return
        sql = (
            "SELECT facts.key, seq, vector FROM facts LEFT JOIN vectors ON vectors.key = facts.key AND NOT deleted "
            "WHERE collection = ? AND seq > ? ORDER BY seq"
        )
        changes = db.execute(sql, (self._collection, index.last_seq))
        while rows := changes.fetchmany(_CHUNK):
            keys, seqs = (np.array([row[column] for row in rows], np.int64) for column in (0, 1))
            there = np.array([row[2] is not None for row in rows])
            vectors = np.frombuffer(b"".join(row[2] for row in rows if row[2] is not None), "<f4")
            numbers = keys & _MASK
            with self._lock.writing():
                index.remove(numbers[~there])
                index.put(numbers[there], seqs[there], vectors.reshape(-1, self._info.encoder.dimension))
        index.last_seq = last

    def _tend(self) -> None:
        """Start what is due in the background, one thing at a time."""
        if self._due() is None:
            return
        with self._starting:
            if self._upkeep is None or not self._upkeep.is_alive():
                self._upkeep = threading.Thread(target=self._do, name=f"kb {self._info.name}", daemon=True)
                self._upkeep.start()

    def _due(self) -> Callable[[], object] | None:
        index = self._loaded()
        if index.outdated:
            return self.rebuild
        changed = index.last_seq - self._snapshot_seq
        if index.facts >= self._options.snapshot_from and changed > self._options.snapshot_share * index.facts:
            return self.snapshot
        return None

    def _do(self) -> None:
        try:
            while due := self._due():
                due()
        except CollectionNotFound:
            pass  # It was deleted meanwhile, and its index with it.
        except (KbError, OSError) as exc:
            # The index goes on as it is, and the next write tries again.
            log.warning("%s: looking after the index failed: %s", self._info.name, exc)
