"""What every backend does for one collection (`FactStore`), and for all of them (`Catalog`)."""

from __future__ import annotations

from collections.abc import Collection as Some
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from kb.encoders.base import EncoderIdentity
from kb.errors import CollectionDiffers, EncoderMismatch
from kb.facts import Fact, Hit
from kb.filters import Filter

Conflicts = Literal["supersede", "refuse", "keep"]
Rivalry = tuple[str | None, str, str]
"""Language, subject and relation: two facts that share them speak about the same thing."""


class CollectionInfo(NamedTuple):
    """What a collection was created with. `uid` is never used again, unlike the name."""

    name: str
    uid: str
    encoder: EncoderIdentity
    conflicts: Conflicts
    created_at: datetime


@dataclass(frozen=True)
class Stats:
    """Of a collection: how many facts, the number of its last write, and what the backend tells of its index."""

    facts: int
    deleted: int
    last_seq: int
    index: dict[str, Any]


class Writes(NamedTuple):
    """What one transaction does: facts as they are now, the vectors that are new, and the versions that have passed."""

    facts: list[Fact]
    vectors: dict[str, np.ndarray]
    revisions: list[Fact]


class Writer(Protocol):
    """A transaction on one collection that nobody else writes to meanwhile."""

    last_seq: int

    def by_id(self, ids: Some[str]) -> dict[str, Fact]:
        """Facts by id, the deleted ones too."""
        ...

    def by_content(self, hashes: Some[str]) -> dict[str, Fact]:
        """Facts that aren't deleted, by content hash."""
        ...

    def rivals(self, wanted: Some[Rivalry]) -> list[Fact]:
        """Facts that aren't deleted and speak about one of these."""
        ...

    def matching(self, where: Filter, limit: int) -> list[Fact]:
        """Some facts that match and aren't deleted."""
        ...

    def vectors(self, ids: Some[str]) -> dict[str, np.ndarray]:
        """float32 [dimension] by id, of facts that aren't deleted."""
        ...

    def put(self, writes: Writes) -> None: ...


class FactStore(Protocol):
    """One collection's facts, vectors and history."""

    @property
    def info(self) -> CollectionInfo: ...

    def writing(self) -> AbstractContextManager[Writer]:
        """A transaction: durable at the end, undone by an exception."""
        ...

    def get(self, id: str) -> Fact | None: ...

    def vectors_of(self, facts: Sequence[Fact]) -> dict[str, np.ndarray]:
        """float32 [dimension] by id, of those that are still as they are given here."""
        ...

    def vectors_by_key(self, hashes: Some[bytes]) -> dict[bytes, np.ndarray]:
        """float32 [dimension] by `key_hash` of the facts' keys; of deleted facts only where no other has the key."""
        ...

    def history(self, id: str) -> list[Fact]:
        """Every version of a fact, oldest first."""
        ...

    def page(self, where: Filter, after: str | None, limit: int, *, deleted: bool = False) -> list[Fact]:
        """Facts in an order that updates don't change, behind the one with the id `after`. FactNotFound."""
        ...

    def each(self) -> Iterator[tuple[Fact, np.ndarray]]:
        """Every fact that isn't deleted, with its vector."""
        ...

    def nearest(self, vectors: np.ndarray, k: int, where: Filter | None, at: datetime) -> list[list[Hit]]:
        """For each of the unit vectors [n, dimension] the k best facts that match and are valid, best first."""
        ...

    def stats(self) -> Stats: ...

    def written(self) -> None:
        """Called after a transaction: bring up to date what searches need."""
        ...

    def snapshot(self) -> dict[str, Any]:
        """Keep what can be kept of the index, so that a restart needn't make it again; says what."""
        ...

    def rebuild(self) -> dict[str, Any]:
        """Make the index anew from the facts; says what it is now."""
        ...


class Catalog(Protocol):
    """The collections at one place."""

    kind: str

    def collections(self) -> list[CollectionInfo]: ...

    def create(self, name: str, encoder: EncoderIdentity, conflicts: Conflicts) -> tuple[CollectionInfo, bool]:
        """The collection of that name, and whether it is new. CollectionDiffers, EncoderMismatch."""
        ...

    def open(self, info: CollectionInfo) -> FactStore: ...

    def drop(self, info: CollectionInfo) -> None: ...

    def close(self) -> None: ...


def confirmed(info: CollectionInfo, encoder: EncoderIdentity, conflicts: Conflicts) -> CollectionInfo:
    """The collection, if it is what was asked for. Raises EncoderMismatch, CollectionDiffers."""
    if info.encoder != encoder:
        raise EncoderMismatch(
            f"collection {info.name!r} is of encoder {info.encoder.name!r} ({info.encoder.dimension} numbers,"
            f" {info.encoder.digest[:19]}), not of {encoder.name!r} ({encoder.dimension}, {encoder.digest[:19]});"
            " make a new collection for another encoder",
            "encoder",
        )
    if info.conflicts != conflicts:
        raise CollectionDiffers(
            f"collection {info.name!r} has conflicts {info.conflicts!r}, not {conflicts!r}; send what it has, or make a"
            " new collection",
            "conflicts",
        )
    return info
