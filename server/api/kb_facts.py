"""`/v1/kb/collections/{collection}/facts`: read, search and delete facts."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter
from fastapi import Query as QueryParameter
from fastapi.concurrency import run_in_threadpool

from kb.collection import Collection
from kb.errors import FactNotFound
from kb.facts import Language
from kb.filters import Filter
from server import metrics, tracing
from server.api.errors import EnvelopeRoute
from server.api.kb_models import (
    Deletion,
    DeletionResult,
    EncoderBody,
    EncoderDep,
    FactPage,
    KbDep,
    Match,
    Matches,
    Query,
    check_encoder,
    fact_json,
)
from server.encoding import BatchedEncoder

PREFIX = "/v1/kb/collections/{collection}/facts"
router = APIRouter(prefix=PREFIX, tags=["knowledge"], route_class=EnvelopeRoute)


@router.get("", operation_id="list_kb_facts")
def list_facts(
    kb: KbDep,
    collection: str,
    after: str | None = None,
    limit: Annotated[int, QueryParameter(ge=1, le=1000)] = 100,
    language: Language | None = None,
    subject: str | None = None,
    relation: str | None = None,
    source: str | None = None,
    deleted: bool = False,
) -> FactPage:
    """List facts, oldest first; with `deleted`, the deleted ones as well."""
    fields = {"language": language, "subject": subject, "relation": relation, "source": source}
    where = Filter(**{name: [value] for name, value in fields.items() if value is not None})
    page = kb.collection(collection).facts(where, after, limit, deleted=deleted)
    return FactPage(data=[fact_json(fact) for fact in page.facts], next=page.next)


@router.get("/{id}", operation_id="get_kb_fact")
def get_fact(kb: KbDep, collection: str, id: str) -> dict[str, object]:
    """Read a fact."""
    return fact_json(kb.collection(collection).get(id))


@router.get("/{id}/history", operation_id="get_kb_fact_history")
def get_history(kb: KbDep, collection: str, id: str) -> FactPage:
    """Read every version of a fact, oldest first, also of one that was deleted."""
    return FactPage(data=[fact_json(fact) for fact in kb.collection(collection).history(id)])


@router.post("/query", operation_id="query_kb_facts")
async def query_facts(kb: KbDep, encoder: EncoderDep, collection: str, query: Query) -> Matches:
    """Find the facts nearest to a text or a vector, among those that are valid now, or `at` a time."""
    found = await run_in_threadpool(kb.collection, collection)
    vector = await _vector(found, encoder, query)
    with metrics.KB_SEARCH.time(), tracing.span("kb.search"):
        (hits,) = await run_in_threadpool(found.search, vector, query.top_k, where=query.filter, at=query.at)
    return Matches(
        encoder=EncoderBody(**found.encoder._asdict()),
        data=[Match(score=hit.score, fact=fact_json(hit.fact)) for hit in hits if hit.score >= query.min_score],
    )


@router.post("/delete", operation_id="delete_kb_facts")
def delete_facts(kb: KbDep, collection: str, which: Deletion) -> DeletionResult:
    """Delete facts by id or by filter, all in one step. Their history stays."""
    done = kb.changing(collection).delete(which.ids, which.filter)
    return DeletionResult(deleted=done.facts, missing=done.missing)


@router.delete("/{id}", operation_id="delete_kb_fact", status_code=204)
def delete_fact(kb: KbDep, collection: str, id: str) -> None:
    """Delete a fact; 404 where there is none."""
    if not kb.changing(collection).delete([id]).facts:
        raise FactNotFound(f"collection {collection!r} has no fact {id!r}", "id")


async def _vector(collection: Collection, encoder: BatchedEncoder, query: Query) -> np.ndarray:
    """[1, dimension]. Raises EncoderMismatch."""
    if query.embedding is not None:
        return np.array([query.embedding])
    check_encoder(collection, await encoder.identity())
    return (await encoder.encode_query(query.query or ""))[None]
