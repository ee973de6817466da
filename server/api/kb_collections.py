"""`/v1/kb/collections`: make, list and delete collections, and look after their indexes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response

from kb.encoders.base import EncoderIdentity
from server.api.errors import EnvelopeRoute
from server.api.kb_models import (
    CollectionBody,
    CollectionList,
    CollectionObject,
    EncoderDep,
    KbDep,
    StatsObject,
)

router = APIRouter(prefix="/v1/kb/collections", tags=["knowledge"], route_class=EnvelopeRoute)


@router.get("", operation_id="list_kb_collections")
def list_collections(kb: KbDep) -> CollectionList:
    """List the collections, by name."""
    return CollectionList(data=[CollectionObject.of(info) for info in kb.collections()])


@router.put(
    "/{collection}",
    operation_id="create_kb_collection",
    responses={201: {"model": CollectionObject, "description": "The collection was made now"}},
)
def create_collection(
    kb: KbDep, encoder: EncoderDep, collection: str, response: Response, body: CollectionBody | None = None
) -> CollectionObject:
    """Make a collection, or confirm that there is one with these settings: 409 where they differ."""
    body = body or CollectionBody()
    # The identity of the server's own hashes its weights when it is first asked for: not on the event loop.
    identity = EncoderIdentity(**body.encoder.model_dump()) if body.encoder else encoder.encoder.identity
    made, created = kb.create(collection, identity, body.conflicts)
    response.status_code = 201 if created else 200
    return CollectionObject.of(made.info)


@router.get("/{collection}", operation_id="get_kb_collection")
def get_collection(kb: KbDep, collection: str) -> CollectionObject:
    """Read a collection's settings."""
    return CollectionObject.of(kb.collection(collection).info)


@router.delete("/{collection}", operation_id="delete_kb_collection", status_code=204)
def delete_collection(kb: KbDep, collection: str) -> None:
    """Delete a collection with all its facts and their history."""
    kb.drop(collection)


@router.get("/{collection}/stats", operation_id="get_kb_stats")
def get_stats(kb: KbDep, collection: str) -> StatsObject:
    """Read how much there is, and how it is searched."""
    return StatsObject(id=collection, backend=kb.backend, **asdict(kb.collection(collection).stats()))


@router.post("/{collection}/snapshots", operation_id="create_kb_snapshot")
def create_snapshot(kb: KbDep, collection: str) -> dict[str, Any]:
    """Keep the index on disk, so that the next start needn't make it anew."""
    return {"id": collection, "object": "kb.snapshot", **kb.changing(collection).snapshot()}


@router.post("/{collection}/rebuild", operation_id="rebuild_kb_index")
def rebuild_index(kb: KbDep, collection: str) -> dict[str, Any]:
    """Make the index anew from the facts, while searches go on."""
    return {"id": collection, "object": "kb.index", **kb.changing(collection).rebuild()}
