"""`/v1/artifacts/{name}/aliases`: names of versions that move, and the history of an artifact."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from server.api.artifact_models import (
    AliasList,
    AliasTarget,
    History,
    HistoryEntry,
    Limit,
    StoreDep,
    VersionAlias,
    Words,
)
from server.api.artifacts import LARGEST
from server.api.errors import ApiError, EnvelopeRoute
from server.api.etags import ANY, quoted, tags
from server.tenants import TenantStore
from steering_store import ABSENT, Alias
from steering_store.errors import ArtifactNotFound, PreconditionFailed

router = APIRouter(prefix="/v1/artifacts/{name}", tags=["artifacts"], route_class=EnvelopeRoute)


@router.get("/aliases", operation_id="list_aliases", response_model_exclude_none=True)
def list_aliases(
    store: StoreDep, name: str, after: Annotated[str, Query(max_length=64)] = "", limit: Limit = 100
) -> AliasList:
    """List the aliases of an artifact by name."""
    found = store.aliases(name, after=after, limit=limit + 1)
    data = [VersionAlias.of(alias) for alias in found[:limit]]
    return AliasList(data=data, last_id=data[-1].alias if data else None, has_more=len(found) > limit)


@router.get("/aliases/{alias}", operation_id="get_alias", response_model_exclude_none=True)
def get_alias(store: StoreDep, name: str, alias: str, response: Response) -> VersionAlias:
    """Read an alias; its ETag is what a move is compared with."""
    found = store.alias(name, alias)
    if found is None:
        raise ArtifactNotFound(f"no alias {alias!r} of {name!r}; list its aliases to see which there are", "alias")
    return _answer(found, response)


@router.put("/aliases/{alias}", operation_id="set_alias", response_model_exclude_none=True)
def set_alias(
    store: StoreDep, name: str, alias: str, target: AliasTarget, request: Request, response: Response
) -> VersionAlias:
    """Create or move an alias.

    With `If-Match: "ETAG"` only where it still has that tag, with `If-None-Match: *` only where there is none; 412
    otherwise, and the tag that it has now.
    """
    expected = _expected(request, store, name, alias)
    try:
        moved = store.set_alias(name, alias, target.version, expected=expected, by=target.by, reason=target.reason)
    except PreconditionFailed as exc:
        raise _failed(exc) from None
    if expected == ABSENT:
        response.status_code = 201
    return _answer(moved, response)


@router.delete("/aliases/{alias}", operation_id="delete_alias", status_code=204)
def delete_alias(
    store: StoreDep, name: str, alias: str, request: Request, by: Words | None = None, reason: Words | None = None
) -> None:
    """Delete an alias; with `If-Match: "ETAG"` only where it still has that tag, and 412 otherwise."""
    expected = _expected(request, store, name, alias)
    try:
        store.delete_alias(name, alias, expected=expected, by=by, reason=reason)
    except PreconditionFailed as exc:
        raise _failed(exc) from None


@router.get("/history", operation_id="get_history", response_model_exclude_none=True)
def get_history(
    store: StoreDep,
    name: str,
    alias: str | None = None,
    after: Annotated[int, Query(ge=0, le=LARGEST)] = 0,
    limit: Limit = 100,
) -> History:
    """Read who published, moved aliases, yanked and deleted, when and why; of one alias, or of all of the artifact."""
    found = store.history(name, alias, after=after, limit=limit + 1)
    data = [HistoryEntry.of(entry) for entry in found[:limit]]
    return History(data=data, last_id=data[-1].id if data else None, has_more=len(found) > limit)


def _answer(alias: Alias, response: Response) -> VersionAlias:
    response.headers["ETag"] = quoted(alias.etag)
    return VersionAlias.of(alias)


def _expected(request: Request, store: TenantStore, name: str, alias: str) -> str | None:
    """What the store compares the alias with: an etag, ABSENT, or None where the caller sets no condition."""
    match, none_match = (request.headers.get(header) for header in ("if-match", "if-none-match"))
    if none_match is not None:
        if match is not None or none_match.strip() != ANY:
            raise ApiError(400, 'send If-None-Match: *, or If-Match: "ETAG", or neither', "If-None-Match")
        return ABSENT
    if match is None:
        return None
    current = store.alias(name, alias)
    if match.strip() == ANY:
        if current is None:
            raise ApiError(412, f"no alias {alias!r} of {name!r}, and If-Match: * needs one", "alias")
        return current.etag
    seen = tags(match, "If-Match")
    # The store compares once more, in the transaction that moves it.
    return current.etag if current is not None and current.etag in seen else seen[0]


def _failed(exc: PreconditionFailed) -> ApiError:
    headers = {} if exc.current is None else {"ETag": quoted(exc.current)}
    return ApiError(412, exc.message, exc.param, headers)
