"""A collection: facts whose vectors one encoder made, written and searched alike in every backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from kb.backends.base import CollectionInfo, FactStore, Stats
from kb.encoders.base import EncoderIdentity
from kb.errors import DuplicateId, FactNotFound, InvalidFilter, InvalidVector, KbError
from kb.facts import Fact, FactDraft, Hit, aware, key_hash
from kb.filters import Filter
from kb.upserts import Outcome, Planner, tombstones

Encode = Callable[[Sequence[str]], np.ndarray]
MAX_K = 1000
PAGE = 1000
_ALL = Filter()


class Deleted(NamedTuple):
    """How many facts a deletion took, and the ids among those named that no fact had."""

    facts: int
    missing: list[str]


class Page(NamedTuple):
    """Some facts, and the cursor of the next page, None at the end."""

    facts: list[Fact]
    next: str | None


class Collection:
    """Safe to use from several threads. Several processes may write to one collection; none misses a write."""

    def __init__(self, store: FactStore) -> None:
        self._store = store

    @property
    def info(self) -> CollectionInfo:
        return self._store.info

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def encoder(self) -> EncoderIdentity:
        """What made the vectors, and must make those of queries."""
        return self.info.encoder

    def upsert(
        self,
        drafts: Sequence[FactDraft],
        vectors: np.ndarray | Sequence[np.ndarray | None] | None = None,
        *,
        encode: Encode | None = None,
        each: bool = False,
    ) -> list[Outcome]:
        """Write facts in one transaction, durable and found by every search after the return.

        A vector comes from `vectors` ([drafts, dimension], or None where there is none), from the draft's `embedding`,
        from a fact with the same key, or from `encode`, which maps texts to [texts, dimension] and is only asked for
        what nobody knows. Raises a KbError whose `param` begins with the draft's number, and has then written nothing;
        with `each`, a draft that is at fault gets an outcome with the error, and the others are written.
        """
        errors: dict[int, KbError] = {}
        known, looked_up = self._vectors(drafts, vectors, encode, errors)
        seen: dict[str, int] = {}
        for index, draft in enumerate(drafts):
            if draft.id is not None and seen.setdefault(draft.id, index) != index:
                errors[index] = DuplicateId(f"id {draft.id!r} came before in this batch; send each fact once", "id")
        _raise_first(errors, each)
        with self._store.writing() as writer:
            planner = Planner(writer, drafts, self.info.conflicts)
            outcomes = []
            for index, draft in enumerate(drafts):
                if index not in errors:
                    try:
                        outcomes.append(planner.apply(draft, known[index], given=index not in looked_up))
                        continue
                    except KbError as exc:
                        errors[index] = exc
                        _raise_first(errors, each)
                outcomes.append(Outcome(draft.id, "error", error=errors[index]))
            writes = planner.writes()
            if writes.facts:
                writer.put(writes)
        self._store.written()
        return outcomes

    def get(self, id: str) -> Fact:
        """A fact that isn't deleted. Raises FactNotFound."""
        fact = self._store.get(id)
        if fact is None or fact.deleted:
            raise FactNotFound(
                f"collection {self.name!r} has no fact {id!r}; list its facts to see which there are", "id"
            )
        return fact

    def history(self, id: str) -> list[Fact]:
        """Every version, oldest first, deletions included. Raises FactNotFound."""
        versions = self._store.history(id)
        if not versions:
            raise FactNotFound(f"collection {self.name!r} never had a fact {id!r}", "id")
        return versions

    def delete(self, ids: Sequence[str] | None = None, where: Filter | None = None) -> Deleted:
        """Delete facts by id, or all that match a filter, in one transaction. Raises InvalidFilter for an empty one."""
        if (ids is None) == (where is None):
            raise InvalidFilter("name 'ids' or a 'filter', and not both", "ids")
        if where is not None and where.empty:
            raise InvalidFilter("the filter is empty; name a field, or delete the whole collection", "filter")
        count = 0
        missing: list[str] = []
        with self._store.writing() as writer:
            if ids is not None:
                found = writer.by_id(set(ids))
                facts = [fact for fact in found.values() if not fact.deleted]
                missing = [id for id in dict.fromkeys(ids) if id not in found or found[id].deleted]
                count = len(facts)
                if facts:
                    writer.put(tombstones(facts, writer.last_seq))
            elif where is not None:
                while facts := writer.matching(where, PAGE):
                    writer.put(tombstones(facts, writer.last_seq))
                    count += len(facts)
        self._store.written()
        return Deleted(count, missing)

    def search(
        self, vectors: np.ndarray, k: int, *, where: Filter | None = None, at: datetime | None = None
    ) -> list[list[Hit]]:
        """For each query vector, float32 [queries, dimension], the k nearest facts, best first.

        Only facts that are valid `at` that moment (now) and match `where`. Raises InvalidVector, InvalidFilter.
        """
        if not 1 <= k <= MAX_K:
            raise InvalidFilter(f"top_k is {k}, and can be 1 to {MAX_K}", "top_k")
        queries = np.asarray(vectors)
        if queries.ndim != 2 or queries.shape[1] != self.encoder.dimension:
            raise InvalidVector(
                f"query vectors of shape {list(queries.shape)}: collection {self.name!r} takes [queries,"
                f" {self.encoder.dimension}], of encoder {self.encoder.name!r}",
                "embedding",
            )
        if not len(queries):
            return []
        return self._store.nearest(self._units(queries), k, where, aware(at) if at else datetime.now(UTC))

    def vectors(self, facts: Sequence[Fact]) -> list[np.ndarray | None]:
        """The facts' own vectors, each float32 [dimension]; None for one that was changed or deleted meanwhile."""
        known = self._store.vectors_of(facts)
        return [known.get(fact.id) for fact in facts]

    def facts(
        self, where: Filter | None = None, cursor: str | None = None, limit: int = 100, *, deleted: bool = False
    ) -> Page:
        """A page of the facts that match, oldest first; with `deleted`, the deleted ones as well."""
        found = self._store.page(where or _ALL, cursor, limit + 1, deleted=deleted)
        more = len(found) > limit
        return Page(found[:limit], found[limit - 1].id if more else None)

    def each(self) -> Iterator[tuple[Fact, np.ndarray]]:
        """Every fact that isn't deleted with its vector, float32 [dimension], as of one moment."""
        return self._store.each()

    def stats(self) -> Stats:
        return self._store.stats()

    def snapshot(self) -> dict[str, Any]:
        """Keep the index, so that the next start needn't make it anew; says what was kept."""
        return self._store.snapshot()

    def rebuild(self) -> dict[str, Any]:
        """Make the index anew from the facts, while searches go on; says what it is now."""
        return self._store.rebuild()

    def _vectors(
        self,
        drafts: Sequence[FactDraft],
        vectors: np.ndarray | Sequence[np.ndarray | None] | None,
        encode: Encode | None,
        errors: dict[int, KbError],
    ) -> tuple[list[Any], set[int]]:
        """A unit vector per draft, those without one are in `errors`; and the drafts that came without one."""
        found: list[np.ndarray | None] = []
        for index, draft in enumerate(drafts):
            given = draft.embedding if draft.embedding is not None else None if vectors is None else vectors[index]
            try:
                found.append(None if given is None else self._units(np.asarray(given)[None])[0])
            except KbError as exc:
                errors[index] = exc
                found.append(None)
        without = [index for index, vector in enumerate(found) if vector is None and index not in errors]
        keys = {index: key_hash(drafts[index].key) for index in without}
        known = self._store.vectors_by_key(set(keys.values())) if keys else {}
        unknown = {hashed: drafts[index].key for index, hashed in keys.items() if hashed not in known}
        if unknown and encode is not None:
            known |= dict(
                zip(unknown, self._units(np.asarray(encode(list(unknown.values())), np.float32)), strict=True)
            )
        for index, hashed in keys.items():
            if hashed in known:
                found[index] = known[hashed]
            else:
                errors[index] = InvalidVector(
                    "no embedding was sent, and nothing here makes one with the collection's encoder"
                    f" {self.encoder.name!r}; send 'embedding'",
                    "embedding",
                )
        return found, set(without)

    def _units(self, rows: np.ndarray) -> np.ndarray:
        """The rows at length 1. Raises InvalidVector."""
        if rows.ndim != 2 or rows.shape[1] != self.encoder.dimension:
            raise InvalidVector(
                f"an embedding of {rows.shape[-1]} numbers: collection {self.name!r} has {self.encoder.dimension},"
                f" of encoder {self.encoder.name!r}",
                "embedding",
            )
        exact = np.asarray(rows, np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.linalg.norm(exact, axis=1, keepdims=True)
        if not (np.isfinite(lengths) & (lengths > 0)).all():
            raise InvalidVector("an embedding must have finite numbers, and not only zeros", "embedding")
        # What is of length 1 up to rounding stays as it was sent, so that sending it again changes nothing.
        return np.where(np.abs(lengths - 1) < 1e-6, exact, exact / lengths).astype(np.float32)


def _raise_first(errors: dict[int, KbError], each: bool) -> None:
    if errors and not each:
        index = min(errors)
        error = errors[index]
        raise type(error)(f"fact {index}: {error.message}", f"{index}.{error.param}" if error.param else str(index))
