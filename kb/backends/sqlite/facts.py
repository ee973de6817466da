"""One collection's facts in SQLite, searched through the index in memory."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection as Some
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from kb.backends.base import CollectionInfo, Stats
from kb.backends.sqlite.database import NUMBER_BITS, Database, one_moment, transaction
from kb.backends.sqlite.live_index import LiveIndex
from kb.backends.sqlite.rows import COLUMNS, SELECTED, conditions, fact_of, in_batches, marks
from kb.backends.sqlite.writer import SqliteWriter
from kb.errors import FactNotFound
from kb.facts import Fact, Hit
from kb.filters import Filter
from kb.index import Found, IndexOptions

_ATTEMPTS = 8
_ALL = Filter()


class SqliteFacts:
    """`FactStore`."""

    def __init__(self, db: Database, info: CollectionInfo, collection: int, path: Path, options: IndexOptions) -> None:
        self._db, self._info, self._collection = db, info, collection
        self.index = LiveIndex(db, info, collection, path, options)

    @property
    def info(self) -> CollectionInfo:
        return self._info

    @contextmanager
    def writing(self) -> Iterator[SqliteWriter]:
        with self._db.connection() as db, transaction(db):
            yield SqliteWriter(db, self._collection, self._info.name)

    def written(self) -> None:
        # So that the next search finds little to read. One that was never searched needs no index.
        if self.index.loaded:
            self.index.sync()

    def get(self, id: str) -> Fact | None:
        with self._db.connection() as db:
            return self._get(db, id)

    def vectors_of(self, facts: Sequence[Fact]) -> dict[str, np.ndarray]:
        seqs = {fact.id: fact.seq for fact in facts}
        found = {}
        with self._db.connection() as db:
            for some in in_batches(seqs):
                sql = (
                    "SELECT id, seq, vector FROM facts JOIN vectors USING (key) "
                    f"WHERE collection = ? AND NOT deleted AND id IN ({marks(some)})"
                )
                for id, seq, vector in db.execute(sql, (self._collection, *some)):
                    if seq == seqs[id]:
                        found[id] = np.frombuffer(vector, "<f4")
        return found

    def vectors_by_key(self, hashes: Some[bytes]) -> dict[bytes, np.ndarray]:
        found = {}
        with self._db.connection() as db:
            for some in in_batches(hashes):
                sql = (
                    "SELECT key_hash, vector FROM facts JOIN vectors USING (key) "
                    f"WHERE collection = ? AND key_hash IN ({marks(some)}) ORDER BY deleted DESC"
                )
                for hashed, vector in db.execute(sql, (self._collection, *some)):
                    found[hashed] = np.frombuffer(vector, "<f4")
        return found

    def history(self, id: str) -> list[Fact]:
        with self._db.connection() as db, one_moment(db):
            sql = "SELECT fact FROM revisions WHERE collection = ? AND id = ? ORDER BY version"
            past = [json.loads(row[0]) for row in db.execute(sql, (self._collection, id))]
            now = self._get(db, id)
        return [_fact_of(values) for values in past] + ([now] if now is not None else [])

    def page(self, where: Filter, after: str | None, limit: int, *, deleted: bool = False) -> list[Fact]:
        condition, values = conditions(where)
        with self._db.connection() as db, one_moment(db):
            first = self._collection << NUMBER_BITS if after is None else self._key(db, after)
            sql = (
                f"SELECT {SELECTED} FROM facts WHERE collection = ? AND key > ? {'' if deleted else 'AND NOT deleted'}"
                f"{condition} ORDER BY key LIMIT ?"
            )
            return [fact_of(row) for row in db.execute(sql, (self._collection, first, *values, limit))]

    def each(self) -> Iterator[tuple[Fact, np.ndarray]]:
        span = (self._collection << NUMBER_BITS, (self._collection + 1) << NUMBER_BITS)
        sql = (
            f"SELECT {SELECTED}, vector FROM vectors JOIN facts USING (key) "
            "WHERE key >= ? AND key < ? AND NOT deleted ORDER BY key"
        )
        with self._db.connection() as db, one_moment(db):
            for row in db.execute(sql, span):
                yield fact_of(row), np.frombuffer(row["vector"], "<f4")

    def nearest(self, vectors: np.ndarray, k: int, where: Filter | None, at: datetime) -> list[list[Hit]]:
        # Most searches need no list of all facts that match: the best few do, or enough of them.
        fetched = k + 4 if where is None else 4 * k + 32
        found, rows = self._search(vectors, fetched, None)
        hits = self._hits(found, rows, k, where, at)
        if found.numbers.shape[1] == fetched and any(len(each) < k for each in hits):
            found, rows = self._search(vectors, k, (where or _ALL, at))
            hits = self._hits(found, rows, k, where, at)
        return hits

    def stats(self) -> Stats:
        with self._db.connection() as db, one_moment(db):
            last = db.execute("SELECT last_seq FROM collections WHERE id = ?", (self._collection,)).fetchone()
            counts = dict(
                db.execute(
                    "SELECT deleted, count(*) FROM facts WHERE collection = ? GROUP BY deleted", (self._collection,)
                )
            )
        return Stats(counts.get(0, 0), counts.get(1, 0), last[0] if last else 0, self.index.describe())

    def snapshot(self) -> dict[str, Any]:
        return self.index.snapshot()

    def rebuild(self) -> dict[str, Any]:
        return self.index.rebuild()

    def _search(
        self, vectors: np.ndarray, k: int, allowed: tuple[Filter, datetime] | None
    ) -> tuple[Found, dict[int, Fact]]:
        """What the index finds, and the facts that it found, without those that changed in that moment."""
        for _ in range(_ATTEMPTS):
            numbers = None if allowed is None else self._numbers(*allowed)
            found = self.index.search(vectors, k, numbers)
            rows = self._rows({int(number) for number in found.numbers.ravel() if number >= 0})
            # A fact that another one wrote between the two lines above is no longer what the score is of.
            current = {
                int(number): rows[number]
                for number, seq in zip(found.numbers.ravel(), found.seqs.ravel(), strict=True)
                if number in rows and rows[number].seq == seq and not rows[number].deleted
            }
            if len(current) == len({int(number) for number in found.numbers.ravel() if number >= 0}):
                break
        return found, current

    def _hits(self, found: Found, rows: dict[int, Fact], k: int, where: Filter | None, at: datetime) -> list[list[Hit]]:
        hits: list[list[Hit]] = []
        for scores, numbers in zip(found.scores, found.numbers, strict=True):
            facts = ((rows.get(int(number)), float(score)) for number, score in zip(numbers, scores, strict=True))
            good = [
                Hit(fact, score)
                for fact, score in facts
                if fact is not None and fact.valid_at(at) and (where is None or where.matches(fact))
            ]
            hits.append(good[:k])
        return hits

    def _numbers(self, where: Filter, at: datetime) -> np.ndarray:
        condition, values = conditions(where, at)
        # Values are bound: `conditions` writes columns and question marks.
        sql = f"SELECT key FROM facts WHERE collection = ? AND NOT deleted{condition}"  # nosec B608
        with self._db.connection() as db:
            keys = db.execute(sql, (self._collection, *values)).fetchall()
        return np.array([key for (key,) in keys], np.int64) & ((1 << NUMBER_BITS) - 1)

    def _rows(self, numbers: set[int]) -> dict[int, Fact]:
        found = {}
        base = self._collection << NUMBER_BITS
        with self._db.connection() as db:
            for some in in_batches(base | number for number in numbers):
                sql = f"SELECT key, {SELECTED} FROM facts WHERE key IN ({marks(some)})"  # nosec B608: as above
                for row in db.execute(sql, some):
                    found[row["key"] - base] = fact_of(row)
        return found

    def _get(self, db: sqlite3.Connection, id: str) -> Fact | None:
        sql = f"SELECT {SELECTED} FROM facts WHERE collection = ? AND id = ?"
        row = db.execute(sql, (self._collection, id)).fetchone()
        return None if row is None else fact_of(row)

    def _key(self, db: sqlite3.Connection, id: str) -> int:
        sql = "SELECT key FROM facts WHERE collection = ? AND id = ?"
        row = db.execute(sql, (self._collection, id)).fetchone()
        if row is None:
            raise FactNotFound(f"no fact {id!r} to go on behind; use the 'next' of an earlier page", "after")
        return int(row[0])


def _fact_of(values: dict[str, Any]) -> Fact:
    """A fact of `revisions`, which has a value for each of `COLUMNS`."""
    return fact_of({name: values[name] for name in COLUMNS})
