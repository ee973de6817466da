"""What an upsert does to a collection, draft by draft: which facts are new, changed, the same, or in the way."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal, NamedTuple

import numpy as np

from kb.backends.base import Conflicts, Rivalry, Writer, Writes
from kb.errors import FactConflict, KbError
from kb.facts import Fact, FactDraft, content_hash

Status = Literal["created", "updated", "unchanged", "error"]
_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_AGES = (datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC))


class Outcome(NamedTuple):
    """What became of one draft. `supersedes` are the ids of facts that it took the place of."""

    id: str | None
    status: Status
    version: int = 0
    seq: int = 0
    supersedes: tuple[str, ...] = ()
    error: KbError | None = None


class Planner:
    """Applies drafts one after the other to what the writer knows, and collects what has to be written."""

    def __init__(self, writer: Writer, drafts: Sequence[FactDraft], conflicts: Conflicts) -> None:
        self._conflicts = conflicts
        self._now = datetime.now(UTC)
        self._seq = writer.last_seq
        self._facts = writer.by_id({draft.id for draft in drafts if draft.id})
        hashes = {content_hash(draft) for draft in drafts if draft.id is None}
        self._by_content = writer.by_content(hashes)
        self._rivals: defaultdict[Rivalry, dict[str, Fact]] = defaultdict(dict)
        if conflicts != "keep":
            for fact in writer.rivals({key for draft in drafts if (key := _rivalry(draft))}):
                self._add_rival(fact)
        for fact in [*self._by_content.values(), *(f for each in self._rivals.values() for f in each.values())]:
            self._facts.setdefault(fact.id, fact)
        self._vectors = writer.vectors({fact.id for fact in self._facts.values() if not fact.deleted})
        self._changed: dict[str, Fact] = {}
        self._new_vectors: dict[str, np.ndarray] = {}
        self._revisions: list[Fact] = []

    def apply(self, draft: FactDraft, vector: np.ndarray, *, given: bool = True) -> Outcome:
        """Raises FactConflict, and has then done nothing. A vector that wasn't `given` is of any fact with this key."""
        hashed = content_hash(draft)
        known = self._facts.get(draft.id) if draft.id else self._by_content.get(hashed)
        if not given and known is not None and not known.deleted and known.key == draft.key:
            # Clients may have sent other vectors with other facts of the same key.
            vector = self._vectors.get(known.id, vector)
        if known is not None and not known.deleted and self._says_the_same(known, draft, vector):
            return Outcome(known.id, "unchanged", known.version, known.seq)
        id = known.id if known else draft.id or new_id()
        rivals = self._in_the_way(id, draft)
        for rival in rivals:
            self._write(dataclasses.replace(rival, deleted=True, superseded_by=id), rival)
        alive = known is not None and not known.deleted
        fact = Fact(
            id=id,
            content_hash=hashed,
            version=0 if known is None else known.version,
            seq=0,
            created_at=known.created_at if known is not None else self._now,
            updated_at=self._now,
            **draft.columns(),
        )
        written = self._write(fact, known)
        if not alive or not np.array_equal(self._vectors.get(id, ()), vector):
            self._vectors[id] = self._new_vectors[id] = vector
        return Outcome(
            id, "updated" if alive else "created", written.version, written.seq, tuple(rival.id for rival in rivals)
        )

    def writes(self) -> Writes:
        # Those of facts that were changed and superseded in one batch as well: a vector must be that of its text.
        return Writes(list(self._changed.values()), self._new_vectors, self._revisions)

    def _write(self, fact: Fact, previous: Fact | None) -> Fact:
        self._seq += 1
        fact = dataclasses.replace(fact, version=fact.version + 1, seq=self._seq, updated_at=self._now)
        if previous is not None:
            self._revisions.append(previous)
            self._forget(previous)
        self._facts[fact.id] = self._changed[fact.id] = fact
        if not fact.deleted:
            self._by_content[fact.content_hash] = fact
            self._add_rival(fact)
        return fact

    def _forget(self, fact: Fact) -> None:
        known = self._by_content.get(fact.content_hash)
        if known is not None and known.id == fact.id:
            del self._by_content[fact.content_hash]
        if key := _rivalry(fact):
            self._rivals[key].pop(fact.id, None)

    def _add_rival(self, fact: Fact) -> None:
        if key := _rivalry(fact):
            self._rivals[key][fact.id] = fact

    def _says_the_same(self, known: Fact, draft: FactDraft, vector: np.ndarray) -> bool:
        same = all(getattr(known, name) == value for name, value in draft.columns().items())
        return same and np.array_equal(self._vectors.get(known.id, ()), vector)

    def _in_the_way(self, id: str, draft: FactDraft) -> list[Fact]:
        key = _rivalry(draft)
        if key is None or self._conflicts == "keep":
            return []
        rivals = [fact for fact in self._rivals[key].values() if fact.id != id and _at_once(fact, draft)]
        if rivals and self._conflicts == "refuse":
            raise FactConflict(
                f"{rivals[0].id!r} already says something about {draft.subject!r}, {draft.relation!r}; update that fact"
                " by its id, delete it, or give both intervals of validity that don't meet",
                "relation",
            )
        return rivals


def tombstones(facts: Sequence[Fact], last_seq: int) -> Writes:
    """What deletes these facts."""
    now = datetime.now(UTC)
    deleted = [
        dataclasses.replace(fact, deleted=True, version=fact.version + 1, seq=seq, updated_at=now)
        for seq, fact in enumerate(facts, start=last_seq + 1)
    ]
    return Writes(deleted, {}, list(facts))


def new_id() -> str:
    """A ULID: 48 bits of milliseconds and 80 of chance, so that ids sort by time."""
    number = time.time_ns() // 1_000_000 << 80 | int.from_bytes(os.urandom(10), "big")
    return "".join(_BASE32[number >> shift & 31] for shift in range(125, -1, -5))


def _rivalry(fact: Fact | FactDraft) -> Rivalry | None:
    if fact.subject is None or fact.relation is None:
        return None
    return fact.language, fact.subject, fact.relation


def _at_once(fact: Fact, draft: FactDraft) -> bool:
    """Whether there is a moment at which both hold."""
    first, last = _AGES
    return (fact.valid_from or first) < (draft.valid_to or last) and (draft.valid_from or first) < (
        fact.valid_to or last
    )
