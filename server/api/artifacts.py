"""`/v1/artifacts`: list, read and publish what the store holds."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse
from pydantic import BaseModel

from server.api.errors import EnvelopeRoute
from server.api.uploads import read_upload
from steering_store import ArtifactVersion, Manifest, Reference, Store, parse_reference
from steering_store.manifest import Kind

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], route_class=EnvelopeRoute)

IMMUTABLE = "public, max-age=31536000, immutable"
REVALIDATE = "no-cache"

_MULTIPART = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["manifest", "files"],
                    "properties": {
                        "manifest": {"type": "string", "description": "The manifest, as JSON"},
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                    },
                }
            }
        },
    }
}


class Artifact(BaseModel):
    """An artifact by its name, as of its highest version."""

    id: str
    object: Literal["artifact"] = "artifact"
    kind: Kind
    description: str
    latest_version: int
    digest: str
    created_at: datetime


class ArtifactList(BaseModel):
    """A page of artifacts; pass `last_id` as `after` for the next."""

    object: Literal["list"] = "list"
    data: list[Artifact]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Version(BaseModel):
    """One version of an artifact. `digest` is the SHA-256 of the manifest in canonical form."""

    id: str
    object: Literal["artifact.version"] = "artifact.version"
    name: str
    version: int
    digest: str
    created_at: datetime
    manifest: Manifest


class ArtifactVersions(Artifact):
    """An artifact with all its versions, oldest first."""

    versions: list[Version]


async def get_store(request: Request) -> Store:
    """The store of the running server."""
    store = request.app.state.polyhelm.store
    assert isinstance(store, Store)
    return store


StoreDep = Annotated[Store, Depends(get_store)]


@router.get("", operation_id="list_artifacts")
def list_artifacts(
    store: StoreDep,
    kind: Kind | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> ArtifactList:
    """List the artifacts by name, each as of its highest version."""
    page = store.list_artifacts(kind=kind, after=after, limit=limit)
    data = [_artifact(version) for version in page.items]
    return ArtifactList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=page.has_more,
    )


@router.get("/{name}", operation_id="get_artifact", response_model_exclude_none=True)
def get_artifact(store: StoreDep, name: str) -> ArtifactVersions:
    """Read an artifact with all its versions."""
    versions = store.versions(name)
    summary = _artifact(versions[-1])
    return ArtifactVersions(**summary.model_dump(), versions=[_version(version) for version in versions])


@router.get("/{name}/versions/{ref}", operation_id="get_artifact_version", response_model_exclude_none=True)
def get_artifact_version(store: StoreDep, name: str, ref: str, response: Response) -> Version:
    """Read one version; `ref` is a version number, `sha256:HEX64` or `latest`."""
    version = _resolve(store, name, ref)
    response.headers.update(_cache_headers(version.digest, ref))
    return _version(version)


@router.get(
    "/{name}/versions/{ref}/files/{path:path}", operation_id="download_artifact_file", response_class=FileResponse
)
def download_artifact_file(store: StoreDep, name: str, ref: str, path: str, request: Request) -> Response:
    """Download one file of a version. Ranges are answered; the bytes are verified before any is sent."""
    version = _resolve(store, name, ref)
    location = store.file_path(version, path)
    headers = _cache_headers(f"sha256:{location.name}", ref)
    if headers["ETag"] in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return FileResponse(location, media_type="application/octet-stream", filename=path, headers=headers)


@router.post(
    "/{name}/versions",
    operation_id="publish_artifact_version",
    status_code=201,
    responses={200: {"model": Version, "description": "The same artifact was published before"}},
    response_model_exclude_none=True,
    openapi_extra=_MULTIPART,
)
async def publish_artifact_version(store: StoreDep, name: str, request: Request, response: Response) -> Version:
    """Publish a version: a part `manifest` (JSON), and one part per file, called by its file name in the manifest."""
    async with read_upload(request, max_bytes=store.max_bytes, max_files=store.max_files) as upload:
        version, created = await run_in_threadpool(store.publish, name, upload.manifest, upload.files)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"{router.prefix}/{name}/versions/{version.version}"
    response.headers["ETag"] = f'"{version.digest}"'
    return _version(version)


def _resolve(store: Store, name: str, ref: str) -> ArtifactVersion:
    return store.resolve(Reference(name) if ref == "latest" else parse_reference(f"{name}@{ref}"))


def _cache_headers(digest: str, ref: str) -> dict[str, str]:
    return {"ETag": f'"{digest}"', "Cache-Control": REVALIDATE if ref == "latest" else IMMUTABLE}


def _artifact(version: ArtifactVersion) -> Artifact:
    return Artifact(
        id=version.name,
        kind=version.manifest.kind,
        description=version.manifest.description,
        latest_version=version.version,
        digest=version.digest,
        created_at=version.created_at,
    )


def _version(version: ArtifactVersion) -> Version:
    return Version(
        id=version.ref,
        name=version.name,
        version=version.version,
        digest=version.digest,
        created_at=version.created_at,
        manifest=version.manifest,
    )
