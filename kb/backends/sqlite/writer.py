"""A write transaction on one collection in SQLite."""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Collection as Some

import numpy as np

from kb.backends.base import Rivalry, Writes
from kb.backends.sqlite.database import NUMBER_BITS
from kb.backends.sqlite.rows import COLUMNS, SELECTED, conditions, fact_of, in_batches, marks, to_json, values_of
from kb.errors import CollectionNotFound
from kb.facts import Fact
from kb.filters import Filter

_NAMES = (*COLUMNS, "key_hash")
_PLACES = ", ".join(f":{name}" for name in _NAMES)
_INSERT = f"INSERT INTO facts (key, collection, {', '.join(_NAMES)}) VALUES (:key, :collection, {_PLACES})"
_UPDATE = f"UPDATE facts SET {', '.join(f'{name} = :{name}' for name in _NAMES)} WHERE key = :key"


class SqliteWriter:
    """`Writer`. The caller holds the write lock of the database."""

    def __init__(self, db: sqlite3.Connection, collection: int, name: str) -> None:
        self._db, self._collection = db, collection
        row = db.execute("SELECT last_seq, last_number FROM collections WHERE id = ?", (collection,)).fetchone()
        if row is None:
            raise CollectionNotFound(f"collection {name!r} was deleted meanwhile", "collection")
        self.last_seq: int = row["last_seq"]
        self._last_number: int = row["last_number"]

    def by_id(self, ids: Some[str]) -> dict[str, Fact]:
        return {fact.id: fact for fact in self._select("id IN", ids)}

    def by_content(self, hashes: Some[str]) -> dict[str, Fact]:
        return {fact.content_hash: fact for fact in self._select("NOT deleted AND content_hash IN", hashes)}

    def rivals(self, wanted: Some[Rivalry]) -> list[Fact]:
        subjects = {subject for _, subject, _ in wanted}
        condition = "NOT deleted AND relation IS NOT NULL AND subject IN"
        found = self._select(condition, subjects)
        return [fact for fact in found if (fact.language, fact.subject, fact.relation) in wanted]

    def matching(self, where: Filter, limit: int) -> list[Fact]:
        condition, values = conditions(where)
        sql = f"SELECT {SELECTED} FROM facts WHERE collection = ? AND NOT deleted{condition} ORDER BY key LIMIT ?"
        return [fact_of(row) for row in self._db.execute(sql, (self._collection, *values, limit))]

    def vectors(self, ids: Some[str]) -> dict[str, np.ndarray]:
        found = {}
        for some in in_batches(ids):
            sql = (
                f"SELECT id, vector FROM facts JOIN vectors USING (key) WHERE collection = ? AND id IN ({marks(some)})"
            )
            for id, vector in self._db.execute(sql, (self._collection, *some)):
                found[id] = np.frombuffer(vector, np.float32)
        return found

    def put(self, writes: Writes) -> None:
        self._db.executemany(
            "INSERT INTO revisions VALUES (?, ?, ?, ?)",
            [(self._collection, fact.id, fact.version, to_json(fact)) for fact in writes.revisions],
        )
        keys = self._keys([fact.id for fact in writes.facts if fact.version > 1])
        known = set(keys)
        for fact in writes.facts:
            if fact.id not in known:
                self._last_number += 1
                keys[fact.id] = self._collection << NUMBER_BITS | self._last_number
        for statement, is_known in ((_INSERT, False), (_UPDATE, True)):
            self._db.executemany(
                statement,
                [
                    {"key": keys[fact.id], "collection": self._collection, **values_of(fact)}
                    for fact in writes.facts
                    if (fact.id in known) == is_known
                ],
            )
        self._db.executemany(
            "INSERT INTO vectors VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET vector = excluded.vector",
            [(keys[id], np.ascontiguousarray(vector, "<f4").tobytes()) for id, vector in writes.vectors.items()],
        )
        self.last_seq = max(self.last_seq, *(fact.seq for fact in writes.facts))
        self._db.execute("INSERT INTO writes VALUES (?, ?, ?)", (self._collection, self.last_seq, secrets.token_hex(8)))
        self._db.execute(
            "UPDATE collections SET last_seq = ?, last_number = ? WHERE id = ?",
            (self.last_seq, self._last_number, self._collection),
        )

    def _keys(self, ids: list[str]) -> dict[str, int]:
        keys: dict[str, int] = {}
        for some in in_batches(ids):
            sql = f"SELECT id, key FROM facts WHERE collection = ? AND id IN ({marks(some)})"
            keys |= {id: key for id, key in self._db.execute(sql, (self._collection, *some))}
        return keys

    def _select(self, condition: str, values: Some[str]) -> list[Fact]:
        facts = []
        for some in in_batches(values):
            sql = f"SELECT {SELECTED} FROM facts WHERE collection = ? AND {condition} ({marks(some)})"
            facts += [fact_of(row) for row in self._db.execute(sql, (self._collection, *some))]
        return facts
