"""`/v1/artifacts`: list, read, publish, yank and delete what the store holds."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.concurrency import run_in_threadpool

from server.api.artifact_models import (
    Artifact,
    ArtifactList,
    ArtifactVersions,
    Change,
    Damaged,
    Limit,
    StoreDep,
    Version,
    VersionAlias,
    Words,
)
from server.api.errors import ApiError, EnvelopeRoute
from server.api.etags import ANY, is_known, quoted
from server.api.uploads import read_upload
from server.tenants import TenantStore, name_of
from steering_store import ArtifactVersion, Page, Reference, parse_reference
from steering_store.manifest import Kind, json_schema
from steering_store.reference import LATEST

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], route_class=EnvelopeRoute)

REVALIDATE = "no-cache"
LARGEST = (1 << 63) - 1
"""The largest integer of SQLite."""

_MULTIPART = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["manifest"],
                    "properties": {
                        "manifest": {"type": "string", "description": "The manifest, as JSON"},
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    },
                }
            }
        },
    }
}


@router.get("", operation_id="list_artifacts")
def list_artifacts(
    store: StoreDep,
    kind: Kind | None = None,
    model: str | None = None,
    prefix: Annotated[str, Query(max_length=64, pattern="^[a-z0-9._-]*$")] = "",
    after: str | None = None,
    limit: Limit = 100,
) -> ArtifactList:
    """List the artifacts by name, each as of its highest version that isn't yanked.

    `model` is a name or an architecture as manifests write it, and `prefix` the beginning of artifacts' names.
    """
    page = list_prefix(store, prefix, kind=kind, model=model, after=after, limit=limit)
    names = [name_of(row) for row in page.rows]
    return ArtifactList(
        data=[Artifact.of(version) for version in page.items],
        damaged=[Damaged.of(problem) for problem in page.damaged],
        first_id=names[0] if names else None,
        last_id=names[-1] if names else None,
        has_more=page.has_more,
    )


@router.get("/schema", operation_id="get_manifest_schema")
def get_manifest_schema() -> dict[str, Any]:
    """The JSON Schema of a manifest."""
    return json_schema()


@router.get("/{name}", operation_id="get_artifact", response_model_exclude_none=True)
def get_artifact(
    store: StoreDep,
    name: str,
    after: Annotated[int, Query(ge=0, le=LARGEST)] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 100,
) -> ArtifactVersions:
    """Read an artifact with its versions, those behind the number `after` and at most `limit`, and so many aliases."""
    head, page = store.head(name), store.version_page(name, after=after, limit=limit)
    aliases = store.aliases(name, limit=limit + 1)
    return ArtifactVersions(
        **Artifact.of(head).model_dump(),
        versions=[Version.of(version) for version in page.items],
        damaged=[Damaged.of(problem) for problem in page.damaged],
        last_version=int(page.rows[-1].ref.partition("@")[2]) if page.rows else None,
        has_more=page.has_more,
        aliases=[VersionAlias.of(alias) for alias in aliases[:limit]],
        more_aliases=len(aliases) > limit,
    )


@router.get(
    "/{name}/versions/{ref}",
    operation_id="get_artifact_version",
    response_model=Version,
    response_model_exclude_none=True,
)
def get_artifact_version(store: StoreDep, name: str, ref: str, request: Request, response: Response) -> Any:
    """Read one version; `ref` is a version number, an alias, `sha256:HEX64` or `latest`."""
    version = resolve(store, name, ref)
    # Yanking changes what is answered, and the digest stays.
    etag = version.digest + (";yanked" if version.yanked else "")
    headers = {"ETag": quoted(etag), "Cache-Control": REVALIDATE}
    if is_known(request, etag):
        return Response(status_code=304, headers=headers)
    response.headers.update(headers)
    return Version.of(version)


@router.post(
    "/{name}/versions",
    operation_id="publish_artifact_version",
    status_code=201,
    responses={200: {"model": Version, "description": "The same artifact was published before"}},
    response_model_exclude_none=True,
    openapi_extra=_MULTIPART,
)
async def publish_artifact_version(
    store: StoreDep,
    name: str,
    request: Request,
    response: Response,
    by: Words | None = None,
    reason: Words | None = None,
) -> Version:
    """Publish a version: a part `manifest` (JSON), and one part per file, called by its file name in the manifest.

    With `If-None-Match: *`, an artifact that was published before is refused with 412.
    """
    async with read_upload(request, store) as upload:
        version, created = await run_in_threadpool(
            store.publish, name, upload.manifest, upload.files, by=by, reason=reason
        )
    if not created and request.headers.get("if-none-match", "").strip() == ANY:
        raise ApiError(412, f"the same artifact was published before, as {version.ref}", "manifest")
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"{router.prefix}/{name}/versions/{version.version}"
    response.headers["ETag"] = quoted(version.digest)
    return Version.of(version)


@router.delete("/{name}/versions/{version}", operation_id="delete_artifact_version", status_code=204)
async def delete_artifact_version(
    request: Request, store: StoreDep, name: str, version: int, by: Words | None = None, reason: Words | None = None
) -> None:
    """Delete a version for good; 409 while an alias, a preset or a running request needs it."""
    await request.app.state.polyhelm.leases.let_go()
    await run_in_threadpool(store.delete_version, name, version, by=by, reason=reason)


@router.post("/{name}/versions/{version}/yank", operation_id="yank_artifact_version", response_model_exclude_none=True)
def yank_artifact_version(store: StoreDep, name: str, version: int, change: Change | None = None) -> Version:
    """Hide a version from lists and from `latest`. Its number, its digest and its aliases still find it."""
    return Version.of(store.yank(name, version, **_stated(change)))


@router.post(
    "/{name}/versions/{version}/unyank", operation_id="unyank_artifact_version", response_model_exclude_none=True
)
def unyank_artifact_version(store: StoreDep, name: str, version: int, change: Change | None = None) -> Version:
    """Show a yanked version again."""
    return Version.of(store.unyank(name, version, **_stated(change)))


def resolve(store: TenantStore, name: str, ref: str) -> ArtifactVersion:
    """Find a version by the `{ref}` of a path."""
    return store.resolve(Reference(name) if ref == LATEST else parse_reference(f"{name}@{ref}"))


def list_prefix(store: TenantStore, prefix: str, *, after: str | None, limit: int, **filters: str | None) -> Page:
    """A page of the artifacts whose names begin with `prefix`."""
    if not prefix:
        return store.list_artifacts(after=after, limit=limit, **filters)
    # Names are ordered: those with the prefix begin behind every name that sorts before it.
    before = prefix[:-1] + chr(ord(prefix[-1]) - 1) + chr(0x10FFFF)
    page = store.list_artifacts(after=max(after or "", before), limit=limit + 1, **filters)
    rows = [row for row in page.rows if name_of(row).startswith(prefix)]
    return Page(rows[:limit], has_more=len(rows) > limit)


def _stated(change: Change | None) -> dict[str, str | None]:
    return {} if change is None else {"by": change.by, "reason": change.reason}
