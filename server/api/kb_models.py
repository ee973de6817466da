"""What the routes of the knowledge base take and answer with, and the knowledge base itself."""

from __future__ import annotations

import dataclasses
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import Depends, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from kb.backends.base import CollectionInfo, Conflicts
from kb.collection import MAX_K, Collection
from kb.encoders.base import EncoderIdentity
from kb.errors import EncoderMismatch
from kb.facts import Fact, Moment, Text
from kb.filters import Filter
from server.encoding import BatchedEncoder
from server.tenant_kb import TenantKb


class EncoderBody(BaseModel):
    """An encoder's identity: vectors of two collections compare only where all three agree."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=256)]
    dimension: Annotated[int, Field(ge=1)]
    digest: Annotated[str, Field(min_length=1, max_length=128)]


class CollectionBody(BaseModel):
    """Without an encoder, the server's own. One of another takes facts and queries with embeddings only."""

    model_config = ConfigDict(extra="forbid")

    encoder: EncoderBody | None = None
    conflicts: Conflicts = "supersede"


class CollectionObject(BaseModel):
    id: str
    object: Literal["kb.collection"] = "kb.collection"
    encoder: EncoderBody
    conflicts: Conflicts
    created_at: datetime

    @classmethod
    def of(cls, info: CollectionInfo) -> CollectionObject:
        return cls(
            id=info.name,
            encoder=EncoderBody(**info.encoder._asdict()),
            conflicts=info.conflicts,
            created_at=info.created_at,
        )


class CollectionList(BaseModel):
    object: Literal["list"] = "list"
    data: list[CollectionObject]


class StatsObject(BaseModel):
    """`last_seq` is the number of the last write; `index` is told by the process that answers."""

    id: str
    object: Literal["kb.stats"] = "kb.stats"
    backend: str
    facts: int
    deleted: int
    last_seq: int
    index: dict[str, Any]


class FactPage(BaseModel):
    """Pass `next` as `after` for the next page; null at the end."""

    object: Literal["list"] = "list"
    data: list[dict[str, Any]]
    next: str | None = None


class Query(BaseModel):
    """What to look for, as text for the server's encoder, or as a vector of the collection's."""

    model_config = ConfigDict(extra="forbid")

    query: Text | None = None
    embedding: list[float] | None = Field(None, repr=False)
    top_k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    min_score: Annotated[float, Field(ge=-1, le=1)] = -1
    filter: Filter | None = None
    at: Moment | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Query:
        if (self.query is None) == (self.embedding is None):
            raise ValueError("send 'query' or 'embedding', and not both")
        return self


class Match(BaseModel):
    score: float
    fact: dict[str, Any]


class Matches(BaseModel):
    """Best first; scores are cosines of that encoder's vectors."""

    object: Literal["list"] = "list"
    encoder: EncoderBody
    data: list[Match]


class Deletion(BaseModel):
    """Which facts to delete: by id, or all that match a filter."""

    model_config = ConfigDict(extra="forbid")

    ids: Annotated[list[str], Field(min_length=1, max_length=10_000)] | None = None
    filter: Filter | None = None


class DeletionResult(BaseModel):
    """`missing` are the ids that no fact had."""

    object: Literal["kb.deletion"] = "kb.deletion"
    deleted: int
    missing: list[str]


def _kb(request: Request) -> TenantKb:
    return TenantKb(request.app.state.polyhelm.kb)


def _encoder(request: Request) -> BatchedEncoder:
    return request.app.state.polyhelm.encoder


KbDep = Annotated[TenantKb, Depends(_kb)]
EncoderDep = Annotated[BatchedEncoder, Depends(_encoder)]


def fact_json(fact: Fact) -> dict[str, Any]:
    """A fact as clients read it; fields that it doesn't have are left out."""
    values = {field.name: getattr(fact, field.name) for field in dataclasses.fields(fact)}
    return {name: value for name, value in values.items() if value is not None and value != () and value != {}}


def check_encoder(collection: Collection, ours: EncoderIdentity) -> None:
    """Raises EncoderMismatch where the server's encoder isn't the collection's."""
    if collection.encoder != ours:
        raise EncoderMismatch(
            f"collection {collection.name!r} is of encoder {collection.encoder.name!r}, and this server has"
            f" {ours.name!r}; send an embedding, or serve with POLYHELM_KB_ENCODER set to the collection's",
            "query",
        )
