"""Collections in a PostgreSQL database with the extension `vector` (pgvector)."""

from __future__ import annotations

import uuid
from collections.abc import Collection as Some
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
from psycopg.types.json import Jsonb

from kb.backends.base import CollectionInfo, Conflicts, Rivalry, Stats, Writes, confirmed
from kb.backends.postgres_pool import Connection, Pool
from kb.backends.postgres_rows import FIELDS, SELECTED, conditions, fact_of, from_json, one, to_json, vector_text
from kb.encoders.base import EncoderIdentity
from kb.errors import CollectionNotFound, FactNotFound
from kb.facts import Fact, Hit, key_hash
from kb.filters import Filter

HNSW_FROM = 20_000
"""Facts at which `rebuild` makes an index. Without one, PostgreSQL compares with every vector, which is exact."""
HNSW_DIMENSIONS = 2000
_ALL = Filter()
_SCHEMA = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE IF NOT EXISTS kb_collections (
    number bigserial PRIMARY KEY, uid text NOT NULL UNIQUE, name text NOT NULL UNIQUE, encoder text NOT NULL,
    dimension integer NOT NULL, encoder_digest text NOT NULL, conflicts text NOT NULL, created_at timestamptz NOT NULL,
    last_seq bigint NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS kb_facts (
    number bigserial PRIMARY KEY, collection bigint NOT NULL REFERENCES kb_collections ON DELETE CASCADE,
    id text NOT NULL, text text NOT NULL, content_hash text NOT NULL, version integer NOT NULL, seq bigint NOT NULL,
    created_at timestamptz NOT NULL, updated_at timestamptz NOT NULL, question text, answer text, language text,
    subject text, relation text, object text, aliases jsonb NOT NULL, source text, valid_from timestamptz,
    valid_to timestamptz, metadata jsonb NOT NULL, deleted boolean NOT NULL, superseded_by text,
    key_hash bytea NOT NULL, embedding vector, UNIQUE (collection, id)
);
CREATE INDEX IF NOT EXISTS kb_facts_content ON kb_facts (collection, content_hash) WHERE NOT deleted;
CREATE INDEX IF NOT EXISTS kb_facts_any_key ON kb_facts (collection, key_hash);
DROP INDEX IF EXISTS kb_facts_key;
CREATE INDEX IF NOT EXISTS kb_facts_subject ON kb_facts (collection, md5(subject)) WHERE NOT deleted;
CREATE INDEX IF NOT EXISTS kb_facts_language ON kb_facts (collection, language) WHERE NOT deleted;
CREATE TABLE IF NOT EXISTS kb_revisions (
    collection bigint NOT NULL REFERENCES kb_collections ON DELETE CASCADE, id text NOT NULL, version integer NOT NULL,
    fact jsonb NOT NULL, PRIMARY KEY (collection, id, version)
);
"""
_PUT = (
    f"INSERT INTO kb_facts (collection, {SELECTED}, key_hash, embedding) "
    f"VALUES (%(collection)s, {', '.join(f'%({name})s' for name in FIELDS)}, %(key_hash)s, %(embedding)s::vector) "
    "ON CONFLICT (collection, id) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in (*FIELDS, "key_hash"))
    # No new vector: the old one stays. That of a deleted fact is for the same text when it comes again.
    + ", embedding = coalesce(excluded.embedding, kb_facts.embedding)"
)


class PostgresCatalog:
    """`Catalog`."""

    kind = "postgres"

    def __init__(self, url: str) -> None:
        """Make the tables if there are none. Raises KbUnavailable, and KbError where pgvector is missing."""
        self._pool = Pool(url)
        with self._pool.connection() as db, db.transaction():
            # Two servers that start at once: `IF NOT EXISTS` alone doesn't keep them apart.
            db.execute("SELECT pg_advisory_xact_lock(hashtext('polyhelm_kb'))")
            db.execute(_SCHEMA)

    def collections(self) -> list[CollectionInfo]:
        with self._pool.connection() as db:
            return [_info(row) for row in db.execute("SELECT * FROM kb_collections").fetchall()]

    def create(self, name: str, encoder: EncoderIdentity, conflicts: Conflicts) -> tuple[CollectionInfo, bool]:
        with self._pool.connection() as db, db.transaction():
            added = db.execute(
                "INSERT INTO kb_collections (uid, name, encoder, dimension, encoder_digest, conflicts, created_at) "
                "VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (name) DO NOTHING",
                (uuid.uuid4().hex, name, *encoder, conflicts, datetime.now(UTC)),
            ).rowcount
            row = db.execute("SELECT * FROM kb_collections WHERE name = %s", (name,)).fetchone()
            assert row is not None
            return confirmed(_info(row), encoder, conflicts), bool(added)

    def open(self, info: CollectionInfo) -> PostgresFacts:
        with self._pool.connection() as db:
            row = db.execute("SELECT number FROM kb_collections WHERE uid = %s", (info.uid,)).fetchone()
        if row is None:
            raise CollectionNotFound(f"collection {info.name!r} was deleted meanwhile", "collection")
        return PostgresFacts(self._pool, info, row["number"])

    def drop(self, info: CollectionInfo) -> None:
        with self._pool.connection() as db, db.transaction():
            row = db.execute("DELETE FROM kb_collections WHERE uid = %s RETURNING number", (info.uid,)).fetchone()
            if row is not None:
                db.execute(f"DROP INDEX IF EXISTS {_index(row['number'])}")

    def close(self) -> None:
        self._pool.close()


class PostgresFacts:
    """`FactStore`."""

    def __init__(self, pool: Pool, info: CollectionInfo, number: int) -> None:
        self._pool, self._info, self._number = pool, info, number

    @property
    def info(self) -> CollectionInfo:
        return self._info

    @contextmanager
    def writing(self) -> Iterator[PostgresWriter]:
        with self._pool.connection() as db, db.transaction():
            # Writers of one collection take turns.
            sql = "SELECT last_seq FROM kb_collections WHERE number = %s FOR UPDATE"
            row = db.execute(sql, (self._number,)).fetchone()
            if row is None:
                raise CollectionNotFound(f"collection {self._info.name!r} was deleted meanwhile", "collection")
            yield PostgresWriter(db, self._number, row["last_seq"])

    def written(self) -> None:
        """PostgreSQL keeps its index itself."""

    def get(self, id: str) -> Fact | None:
        with self._pool.connection() as db:
            return one(db, self._number, id)

    def vectors_of(self, facts: Sequence[Fact]) -> dict[str, np.ndarray]:
        seqs = {fact.id: fact.seq for fact in facts}
        sql = (
            "SELECT id, seq, embedding::real[] AS vector FROM kb_facts "
            "WHERE collection = %s AND NOT deleted AND id = ANY (%s)"
        )
        with self._pool.connection() as db:
            rows = db.execute(sql, (self._number, list(seqs))).fetchall()
        return {row["id"]: np.array(row["vector"], np.float32) for row in rows if row["seq"] == seqs[row["id"]]}

    def vectors_by_key(self, hashes: Some[bytes]) -> dict[bytes, np.ndarray]:
        sql = (
            "SELECT key_hash, embedding::real[] AS vector FROM kb_facts "
            "WHERE collection = %s AND embedding IS NOT NULL AND key_hash = ANY (%s) ORDER BY deleted DESC"
        )
        with self._pool.connection() as db:
            rows = db.execute(sql, (self._number, list(hashes))).fetchall()
        return {bytes(row["key_hash"]): np.array(row["vector"], np.float32) for row in rows}

    def history(self, id: str) -> list[Fact]:
        sql = "SELECT fact FROM kb_revisions WHERE collection = %s AND id = %s ORDER BY version"
        with self._pool.connection() as db, db.transaction():
            db.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            past = [from_json(row["fact"]) for row in db.execute(sql, (self._number, id)).fetchall()]
            now = one(db, self._number, id)
        return past + ([now] if now is not None else [])

    def page(self, where: Filter, after: str | None, limit: int, *, deleted: bool = False) -> list[Fact]:
        condition, values = conditions(where)
        with self._pool.connection() as db:
            first = 0 if after is None else self._behind(db, after)
            sql = (
                f"SELECT {SELECTED} FROM kb_facts WHERE collection = %s AND number > %s"
                f"{'' if deleted else ' AND NOT deleted'}{condition} ORDER BY number LIMIT %s"
            )
            return [fact_of(row) for row in db.execute(sql, (self._number, first, *values, limit)).fetchall()]

    def each(self) -> Iterator[tuple[Fact, np.ndarray]]:
        sql = (
            f"SELECT {SELECTED}, embedding::real[] AS vector FROM kb_facts "
            "WHERE collection = %s AND NOT deleted ORDER BY number"
        )
        with self._pool.connection() as db, db.transaction(), db.cursor("polyhelm_kb_each") as cursor:
            for row in cursor.execute(sql, (self._number,)):
                vector = np.array(row.pop("vector"), np.float32)
                yield fact_of(row), vector

    def nearest(self, vectors: np.ndarray, k: int, where: Filter | None, at: datetime) -> list[list[Hit]]:
        condition, values = conditions(where or _ALL, at)
        # As the index has it, which PostgreSQL uses only where the expression is the same.
        distance = f"embedding::vector({self._info.encoder.dimension}) <#> %s::vector"
        sql = (
            f"SELECT {SELECTED}, -({distance}) AS score FROM kb_facts "
            f"WHERE collection = {self._number} AND NOT deleted{condition} ORDER BY {distance} LIMIT %s"
        )
        hits = []
        with self._pool.connection() as db, db.transaction():
            db.execute(f"SET LOCAL hnsw.ef_search = {min(1000, max(64, 2 * k))}")
            for vector in map(vector_text, vectors):
                rows = db.execute(sql, (vector, *values, vector, k)).fetchall()
                if len(rows) < k:
                    # An index gives up before it has found enough that match; a scan doesn't.
                    db.execute("SET LOCAL enable_indexscan = off")
                    rows = db.execute(sql, (vector, *values, vector, k)).fetchall()
                hits.append([Hit(score=row.pop("score"), fact=fact_of(row)) for row in rows])
        return hits

    def stats(self) -> Stats:
        with self._pool.connection() as db, db.transaction():
            sql = "SELECT deleted, count(*) AS facts FROM kb_facts WHERE collection = %s GROUP BY deleted"
            counts = {row["deleted"]: row["facts"] for row in db.execute(sql, (self._number,)).fetchall()}
            last = db.execute("SELECT last_seq FROM kb_collections WHERE number = %s", (self._number,)).fetchone()
            there = db.execute("SELECT to_regclass(%s) AS name", (_index(self._number),)).fetchone()
        kind = "hnsw" if there and there["name"] else "exact"
        return Stats(counts.get(False, 0), counts.get(True, 0), last["last_seq"] if last else 0, {"kind": kind})

    def snapshot(self) -> dict[str, Any]:
        """Nothing to keep: the index is in the database."""
        return {"last_seq": self.stats().last_seq}

    def rebuild(self) -> dict[str, Any]:
        """An HNSW index where there are many facts, and none where there are few."""
        dimension = self._info.encoder.dimension
        with self._pool.connection() as db:
            db.execute(f"DROP INDEX IF EXISTS {_index(self._number)}")
            if self.stats().facts >= HNSW_FROM and dimension <= HNSW_DIMENSIONS:
                db.execute(
                    f"CREATE INDEX CONCURRENTLY {_index(self._number)} ON kb_facts USING hnsw "
                    f"((embedding::vector({dimension})) vector_ip_ops) "
                    f"WHERE collection = {self._number} AND NOT deleted"
                )
        return self.stats().index

    def _behind(self, db: Connection, id: str) -> int:
        sql = "SELECT number FROM kb_facts WHERE collection = %s AND id = %s"
        row = db.execute(sql, (self._number, id)).fetchone()
        if row is None:
            raise FactNotFound(f"no fact {id!r} to go on behind; use the 'next' of an earlier page", "after")
        return int(row["number"])


class PostgresWriter:
    """`Writer`. The caller holds the lock on the collection's row."""

    def __init__(self, db: Connection, number: int, last_seq: int) -> None:
        self._db, self._number, self.last_seq = db, number, last_seq

    def by_id(self, ids: Some[str]) -> dict[str, Fact]:
        return {fact.id: fact for fact in self._select("id = ANY (%s)", list(ids))}

    def by_content(self, hashes: Some[str]) -> dict[str, Fact]:
        found = self._select("NOT deleted AND content_hash = ANY (%s)", list(hashes))
        return {fact.content_hash: fact for fact in found}

    def rivals(self, wanted: Some[Rivalry]) -> list[Fact]:
        # By hash: a subject may be longer than PostgreSQL indexes.
        condition = "NOT deleted AND relation IS NOT NULL AND md5(subject) IN (SELECT md5(unnest(%s::text[])))"
        found = self._select(condition, [subject for _, subject, _ in wanted])
        return [fact for fact in found if (fact.language, fact.subject, fact.relation) in wanted]

    def matching(self, where: Filter, limit: int) -> list[Fact]:
        condition, values = conditions(where)
        there = f"collection = %s AND NOT deleted{condition}"
        sql = f"SELECT {SELECTED} FROM kb_facts WHERE {there} ORDER BY number LIMIT %s"
        return [fact_of(row) for row in self._db.execute(sql, (self._number, *values, limit)).fetchall()]

    def vectors(self, ids: Some[str]) -> dict[str, np.ndarray]:
        sql = (
            "SELECT id, embedding::real[] AS vector FROM kb_facts "
            "WHERE collection = %s AND NOT deleted AND id = ANY (%s)"
        )
        rows = self._db.execute(sql, (self._number, list(ids))).fetchall()
        return {row["id"]: np.array(row["vector"], np.float32) for row in rows}

    def put(self, writes: Writes) -> None:
        self.last_seq = max(self.last_seq, *(fact.seq for fact in writes.facts))
        with self._db.cursor() as cursor:
            cursor.executemany(
                "INSERT INTO kb_revisions VALUES (%s, %s, %s, %s)",
                [(self._number, fact.id, fact.version, Jsonb(to_json(fact))) for fact in writes.revisions],
            )
            cursor.executemany(_PUT, [self._values(fact, writes.vectors.get(fact.id)) for fact in writes.facts])
        self._db.execute("UPDATE kb_collections SET last_seq = %s WHERE number = %s", (self.last_seq, self._number))

    def _values(self, fact: Fact, vector: np.ndarray | None) -> dict[str, Any]:
        values = {name: getattr(fact, name) for name in FIELDS}
        return values | {
            "aliases": Jsonb(fact.aliases),
            "metadata": Jsonb(fact.metadata),
            "key_hash": key_hash(fact.key),
            "collection": self._number,
            "embedding": None if vector is None else vector_text(vector),
        }

    def _select(self, condition: str, values: list[str]) -> list[Fact]:
        if not values:
            return []
        sql = f"SELECT {SELECTED} FROM kb_facts WHERE collection = %s AND {condition}"
        return [fact_of(row) for row in self._db.execute(sql, (self._number, values)).fetchall()]


def _index(number: int) -> str:
    return f"kb_facts_hnsw_{number}"


def _info(row: dict[str, Any]) -> CollectionInfo:
    encoder = EncoderIdentity(row["encoder"], row["dimension"], row["encoder_digest"])
    return CollectionInfo(row["name"], row["uid"], encoder, row["conflicts"], row["created_at"].astimezone(UTC))
