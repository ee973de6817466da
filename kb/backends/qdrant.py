"""Collections on a Qdrant server, or in a folder through its client's local mode.

    polyhelm_kb             one point per collection: its settings
    polyhelm_kb_UID         the facts that aren't deleted, with their vectors
    polyhelm_kb_UID_past    versions that have passed, and deleted facts

Qdrant has no transactions: a process that dies in an upsert of many facts may have written some of them, which the same
upsert completes. Writers in one process take turns; two processes that change one fact at the same moment may both be
told that they did.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Collection as Some
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
from qdrant_client import QdrantClient, models
from qdrant_client.http.exceptions import ApiException, UnexpectedResponse

from kb.backends.base import CollectionInfo, Conflicts, Rivalry, Stats, Writes, confirmed
from kb.backends.qdrant_points import any_of, conditions, fact_of, point, point_id
from kb.encoders.base import EncoderIdentity
from kb.errors import CollectionNotFound, FactNotFound, KbError, KbUnavailable
from kb.facts import Fact, Hit
from kb.filters import Filter

REGISTRY = "polyhelm_kb"
_BATCH = 256
_ALL = Filter()


class QdrantCatalog:
    """`Catalog`."""

    kind = "qdrant"

    def __init__(self, place: str) -> None:
        """`place` is `http(s)://HOST:PORT` or `file:FOLDER`. Raises KbUnavailable."""
        with _errors_named():
            local = place.startswith("file:")
            # Unasked, the client looks for the server's version in a thread of its own, and warns from there.
            where = {"path": place.removeprefix("file:")} if local else {"url": place, "check_compatibility": False}
            self.client = QdrantClient(**where)
            self.local = local
            _ensure(self.client, REGISTRY, None)

    def collections(self) -> list[CollectionInfo]:
        with _errors_named():
            return [_info(record.payload or {}) for record in _scroll(self.client, REGISTRY, None)]

    def create(self, name: str, encoder: EncoderIdentity, conflicts: Conflicts) -> tuple[CollectionInfo, bool]:
        for info in self.collections():
            if info.name == name:
                return confirmed(info, encoder, conflicts), False
        info = CollectionInfo(name, uuid.uuid4().hex, encoder, conflicts, datetime.now(UTC))
        with _errors_named():
            _ensure(self.client, _of(info), encoder.dimension)
            _ensure(self.client, _past(info), None)
            if not self.local:
                for field in ("id", "content_hash", "key_hash", "subject", "language"):
                    self.client.create_payload_index(_of(info), field, models.PayloadSchemaType.KEYWORD, wait=True)
                self.client.create_payload_index(_past(info), "key_hash", models.PayloadSchemaType.KEYWORD, wait=True)
            payload = {**info._asdict(), "encoder": list(encoder), "created_at": info.created_at.isoformat()}
            entry = models.PointStruct(id=point_id(name), vector={}, payload=payload)
            self.client.upsert(REGISTRY, [entry], wait=True)
        return info, True

    def open(self, info: CollectionInfo) -> QdrantFacts:
        return QdrantFacts(self.client, info, self.local)

    def drop(self, info: CollectionInfo) -> None:
        with _errors_named():
            self.client.delete(REGISTRY, models.PointIdsList(points=[point_id(info.name)]), wait=True)
            for collection in (_of(info), _past(info)):
                self.client.delete_collection(collection)

    def close(self) -> None:
        self.client.close()


class QdrantFacts:
    """`FactStore`, and the `Writer` of its own writes."""

    def __init__(self, client: QdrantClient, info: CollectionInfo, local: bool) -> None:
        self._client, self._info, self._local = client, info, local
        self._here, self._past = _of(info), _past(info)
        self._lock = threading.Lock()
        self.last_seq = 0

    @property
    def info(self) -> CollectionInfo:
        return self._info

    @contextmanager
    def writing(self) -> Iterator[QdrantFacts]:
        with _errors_named(), self._lock:
            if not self._client.collection_exists(self._here):
                raise CollectionNotFound(f"collection {self._info.name!r} was deleted meanwhile", "collection")
            # There is no counter to share: time grows for all processes.
            self.last_seq = max(self.last_seq, time.time_ns() // 1000)
            yield self

    def written(self) -> None:
        """Qdrant's index is its own."""

    def by_id(self, ids: Some[str]) -> dict[str, Fact]:
        wanted = [point_id(id) for id in ids]
        found: dict[str, Fact] = {}
        for collection in (self._past, self._here):
            for some in _batches(wanted):
                for record in self._client.retrieve(collection, some, with_payload=True):
                    fact = fact_of(record.payload or {})
                    found[fact.id] = fact
        return found

    def by_content(self, hashes: Some[str]) -> dict[str, Fact]:
        return {fact.content_hash: fact for fact in self._with_any("content_hash", hashes)}

    def rivals(self, wanted: Some[Rivalry]) -> list[Fact]:
        found = self._with_any("subject", {subject for _, subject, _ in wanted})
        return [fact for fact in found if (fact.language, fact.subject, fact.relation) in wanted]

    def matching(self, where: Filter, limit: int) -> list[Fact]:
        records, _ = self._client.scroll(self._here, conditions(where), limit=limit, with_payload=True)
        return [fact_of(record.payload or {}) for record in records]

    def vectors(self, ids: Some[str]) -> dict[str, np.ndarray]:
        found = {}
        for some in _batches([point_id(id) for id in ids]):
            for record in self._client.retrieve(self._here, some, with_payload=["id"], with_vectors=True):
                found[(record.payload or {})["id"]] = np.array(record.vector, np.float32)
        return found

    def put(self, writes: Writes) -> None:
        # In this order, so that a process that dies in between never loses a version or leaves a fact without one.
        past = [point(f"{fact.id}@{fact.version}", fact, {}, passed=True) for fact in writes.revisions]
        # With its vector, for the same text when it comes again.
        gone = [fact for fact in writes.facts if fact.deleted]
        known = self.vectors({fact.id for fact in gone}) | writes.vectors
        for fact in gone:
            tombstone = point(fact.id, fact, {})
            if fact.id in known:
                tombstone.payload = (tombstone.payload or {}) | {"vector": known[fact.id].tolist()}
            past.append(tombstone)
        self._upsert(self._past, past)
        alive = [fact for fact in writes.facts if not fact.deleted]
        vectors = self.vectors({fact.id for fact in alive} - writes.vectors.keys()) | writes.vectors
        self._upsert(self._here, [point(fact.id, fact, vectors[fact.id].tolist()) for fact in alive])
        for collection, left in ((self._here, gone), (self._past, alive)):
            for some in _batches([point_id(fact.id) for fact in left]):
                self._client.delete(collection, models.PointIdsList(points=some), wait=True)
        self.last_seq = max(self.last_seq, *(fact.seq for fact in writes.facts))
        # Beside the collection's settings, for whoever opens it next.
        self._client.set_payload(REGISTRY, {"last_seq": self.last_seq}, points=[point_id(self._info.name)], wait=True)

    def get(self, id: str) -> Fact | None:
        with _errors_named():
            return self.by_id([id]).get(id)

    def vectors_of(self, facts: Sequence[Fact]) -> dict[str, np.ndarray]:
        seqs = {point_id(fact.id): fact.seq for fact in facts}
        found = {}
        with _errors_named():
            for some in _batches(list(seqs)):
                for record in self._client.retrieve(self._here, some, with_payload=["id", "seq"], with_vectors=True):
                    payload = record.payload or {}
                    if payload["seq"] == seqs[str(record.id)]:
                        found[payload["id"]] = np.array(record.vector, np.float32)
        return found

    def vectors_by_key(self, hashes: Some[bytes]) -> dict[bytes, np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        with _errors_named():
            for some in _batches([hashed.hex() for hashed in hashes]):
                condition = models.Filter(must=[any_of("key_hash", some)])
                deleted = models.Filter(must=[any_of("key_hash", some), any_of("passed", [False])])
                for record in _scroll(self._client, self._past, deleted):
                    payload = record.payload or {}
                    if "vector" in payload:
                        found[bytes.fromhex(payload["key_hash"])] = np.array(payload["vector"], np.float32)
                for record in _scroll(self._client, self._here, condition, vectors=True):
                    found[bytes.fromhex((record.payload or {})["key_hash"])] = np.array(record.vector, np.float32)
        return found

    def history(self, id: str) -> list[Fact]:
        with _errors_named():
            condition = models.Filter(must=[any_of("id", [id]), any_of("passed", [True])])
            past = [fact_of(record.payload or {}) for record in _scroll(self._client, self._past, condition)]
            now = self.get(id)
        return sorted(past, key=lambda fact: fact.version) + ([now] if now is not None else [])

    def page(self, where: Filter, after: str | None, limit: int, *, deleted: bool = False) -> list[Fact]:
        with _errors_named():
            if after is not None and self.get(after) is None:
                raise FactNotFound(f"no fact {after!r} to go on behind; use the 'next' of an earlier page", "after")
            condition = conditions(where)
            found = self._behind(self._here, condition, after, limit)
            if deleted:
                tombstones = models.Filter(must=[*(condition.must or []), any_of("passed", [False])])
                found += self._behind(self._past, tombstones, after, limit)
        return [fact for _, fact in sorted(found, key=lambda each: each[0])[:limit]]

    def each(self) -> Iterator[tuple[Fact, np.ndarray]]:
        with _errors_named():
            for record in _scroll(self._client, self._here, None, vectors=True):
                yield fact_of(record.payload or {}), np.array(record.vector, np.float32)

    def nearest(self, vectors: np.ndarray, k: int, where: Filter | None, at: datetime) -> list[list[Hit]]:
        condition = conditions(where or _ALL, at)
        requests = [
            models.QueryRequest(query=vector.tolist(), filter=condition, limit=k, with_payload=True)
            for vector in vectors
        ]
        with _errors_named():
            answers = self._client.query_batch_points(self._here, requests)
        return [[Hit(fact_of(each.payload or {}), each.score) for each in answer.points] for answer in answers]

    def stats(self) -> Stats:
        with _errors_named():
            facts = self._client.count(self._here, exact=True).count
            gone = models.Filter(must=[any_of("passed", [False])])
            deleted = self._client.count(self._past, count_filter=gone, exact=True).count
            entry = self._client.retrieve(REGISTRY, [point_id(self._info.name)], with_payload=True)
        last = max([self.last_seq, *((record.payload or {}).get("last_seq", 0) for record in entry)])
        return Stats(facts, deleted, last, {"kind": "qdrant"})

    def snapshot(self) -> dict[str, Any]:
        """A snapshot of Qdrant's own, on the server; in local mode there is no index to keep."""
        if self._local:
            return {"snapshot": None}
        with _errors_named():
            made = self._client.create_snapshot(self._here, wait=True)
        return {"snapshot": made.name if made else None}

    def rebuild(self) -> dict[str, Any]:
        """Qdrant looks after its index itself."""
        return self.stats().index

    def _with_any(self, field: str, values: Some[str]) -> list[Fact]:
        return [
            fact_of(record.payload or {})
            for some in _batches(list(values))
            for record in _scroll(self._client, self._here, models.Filter(must=[any_of(field, some)]))
        ]

    def _behind(
        self, collection: str, condition: models.Filter, after: str | None, limit: int
    ) -> list[tuple[str, Fact]]:
        offset = None if after is None else point_id(after)
        records, _ = self._client.scroll(collection, condition, limit=limit + 1, offset=offset, with_payload=True)
        found = [(str(record.id), fact_of(record.payload or {})) for record in records]
        return [each for each in found if each[0] != offset]

    def _upsert(self, collection: str, points: list[models.PointStruct]) -> None:
        for some in _batches(points):
            self._client.upsert(collection, some, wait=True)


def _ensure(client: QdrantClient, collection: str, dimension: int | None) -> None:
    if not client.collection_exists(collection):
        # Vectors have length 1: the dot product is the cosine, and they are kept as they were sent.
        vectors: Any = models.VectorParams(size=dimension, distance=models.Distance.DOT) if dimension else {}
        client.create_collection(collection, vectors_config=vectors)


def _of(info: CollectionInfo) -> str:
    return f"{REGISTRY}_{info.uid}"


def _past(info: CollectionInfo) -> str:
    return f"{REGISTRY}_{info.uid}_past"


def _scroll(
    client: QdrantClient, collection: str, condition: models.Filter | None, *, vectors: bool = False
) -> Iterator[models.Record]:
    offset = None
    while True:
        records, offset = client.scroll(
            collection, condition, limit=_BATCH, offset=offset, with_payload=True, with_vectors=vectors
        )
        yield from records
        if offset is None:
            return


def _batches(values: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(values), _BATCH):
        yield values[start : start + _BATCH]


def _info(payload: dict[str, Any]) -> CollectionInfo:
    encoder, created = EncoderIdentity(*payload["encoder"]), datetime.fromisoformat(payload["created_at"])
    return CollectionInfo(payload["name"], payload["uid"], encoder, payload["conflicts"], created)


@contextmanager
def _errors_named() -> Iterator[None]:
    try:
        yield
    except UnexpectedResponse as exc:
        if exc.status_code == 404:
            raise CollectionNotFound("the collection was deleted meanwhile", "collection") from exc
        raise KbError(f"Qdrant answered {exc.status_code}: {exc.reason_phrase}") from exc
    except ValueError as exc:
        # What the local mode says instead.
        if "not found" not in str(exc):
            raise
        raise CollectionNotFound("the collection was deleted meanwhile", "collection") from exc
    except (ApiException, OSError) as exc:
        raise KbUnavailable(f"Qdrant can't be reached ({exc}); check POLYHELM_KB_URL") from exc
