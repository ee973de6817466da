"""The collections of a folder: `kb.sqlite3`, and `indexes/` with what can be made again."""

from __future__ import annotations

import sqlite3
import uuid
from datetime import UTC, datetime
from pathlib import Path

from kb import snapshots
from kb.backends.base import CollectionInfo, Conflicts, confirmed
from kb.backends.sqlite.database import NUMBER_BITS, Database, transaction
from kb.backends.sqlite.facts import SqliteFacts
from kb.encoders.base import EncoderIdentity
from kb.errors import CollectionNotFound
from kb.index import IndexOptions


class SqliteCatalog:
    """`Catalog`. Any number of processes may use one folder at once, on a local file system."""

    kind = "sqlite"

    def __init__(self, folder: Path, options: IndexOptions) -> None:
        self._folder, self._options = folder, options
        self._db = Database(folder / "kb.sqlite3")
        snapshots.sweep(self._indexes, {info.uid for info in self.collections()})

    def collections(self) -> list[CollectionInfo]:
        with self._db.connection() as db:
            return [_info(row) for row in db.execute("SELECT * FROM collections")]

    def create(self, name: str, encoder: EncoderIdentity, conflicts: Conflicts) -> tuple[CollectionInfo, bool]:
        with self._db.connection() as db, transaction(db):
            row = db.execute("SELECT * FROM collections WHERE name = ?", (name,)).fetchone()
            if row is not None:
                return confirmed(_info(row), encoder, conflicts), False
            db.execute(
                "INSERT INTO collections (uid, name, encoder, dimension, encoder_digest, conflicts, created_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (uuid.uuid4().hex, name, *encoder, conflicts, datetime.now(UTC).isoformat()),
            )
            return _info(db.execute("SELECT * FROM collections WHERE name = ?", (name,)).fetchone()), True

    def open(self, info: CollectionInfo) -> SqliteFacts:
        with self._db.connection() as db:
            number = db.execute("SELECT id FROM collections WHERE uid = ?", (info.uid,)).fetchone()
        if number is None:
            raise CollectionNotFound(f"collection {info.name!r} was deleted meanwhile", "collection")
        return SqliteFacts(self._db, info, number[0], self._indexes / f"{info.uid}.index", self._options)

    def drop(self, info: CollectionInfo) -> None:
        with self._db.connection() as db, transaction(db):
            row = db.execute("SELECT id FROM collections WHERE uid = ?", (info.uid,)).fetchone()
            if row is not None:
                _delete(db, row[0])
        (self._indexes / f"{info.uid}.index").unlink(missing_ok=True)

    def close(self) -> None:
        self._db.close()

    @property
    def _indexes(self) -> Path:
        return self._folder / "indexes"


def _delete(db: sqlite3.Connection, collection: int) -> None:
    keys = (collection << NUMBER_BITS, (collection + 1) << NUMBER_BITS)
    db.execute("DELETE FROM vectors WHERE key >= ? AND key < ?", keys)
    db.execute("DELETE FROM facts WHERE key >= ? AND key < ?", keys)
    for table in ("revisions", "writes"):
        db.execute(f"DELETE FROM {table} WHERE collection = ?", (collection,))  # nosec B608: one of two constants
    db.execute("DELETE FROM collections WHERE id = ?", (collection,))


def _info(row: sqlite3.Row) -> CollectionInfo:
    return CollectionInfo(
        name=row["name"],
        uid=row["uid"],
        encoder=EncoderIdentity(row["encoder"], row["dimension"], row["encoder_digest"]),
        conflicts=row["conflicts"],
        created_at=datetime.fromisoformat(row["created_at"]),
    )
