"""`/v1/artifacts/{name}/versions/{ref}/files/{path}`: the bytes of an artifact."""

from __future__ import annotations

import base64

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.types import Message, Receive, Scope, Send

from server.api.artifact_models import StoreDep
from server.api.artifacts import REVALIDATE, resolve
from server.api.errors import ApiError, EnvelopeRoute, error_response
from server.api.etags import is_known, quoted
from server.request_context import ANYBODY, current
from steering_store import ArtifactVersion
from steering_store.errors import ArtifactNotFound
from steering_store.manifest import FileEntry
from steering_store.reference import LATEST, parse_reference

router = APIRouter(prefix="/v1/artifacts", tags=["artifacts"], route_class=EnvelopeRoute)

IMMUTABLE = "max-age=31536000, immutable"


class RangedFile(FileResponse):
    """A file, or the ranges of it that were asked for; what is wrong with a range is said in the envelope."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused: ApiError | None = None

        async def in_envelope(message: Message) -> None:
            nonlocal refused
            if message["type"] == "http.response.start" and message["status"] >= 400:
                headers = {name.decode(): value.decode() for name, value in message["headers"]}
                kept = {"Content-Range": headers["content-range"]} if "content-range" in headers else {}
                refused = ApiError(
                    message["status"], "Range: ask for bytes=FIRST-LAST inside the file, from 0", "Range", kept
                )
            if refused is None:
                await send(message)

        await super().__call__(scope, receive, in_envelope)
        if refused is not None:
            await error_response(refused)(scope, receive, send)


@router.get(
    "/{name}/versions/{ref}/files/{path:path}", operation_id="download_artifact_file", response_class=RangedFile
)
def download_artifact_file(store: StoreDep, name: str, ref: str, path: str, request: Request) -> Response:
    """Download one file of a version. Ranges are answered; the bytes are verified before any is sent."""
    version = resolve(store, name, ref)
    entry = _entry(version, path)
    etag = f"sha256:{entry.sha256}"
    headers = {
        "ETag": quoted(etag),
        "Cache-Control": f"{_audience()}, {IMMUTABLE}" if _is_fixed(name, ref) else REVALIDATE,
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(entry.sha256)).decode()}:",
    }
    if is_known(request, etag):
        return Response(status_code=304, headers=headers)
    return RangedFile(
        store.file_path(version, path), media_type="application/octet-stream", filename=path, headers=headers
    )


def _entry(version: ArtifactVersion, path: str) -> FileEntry:
    for entry in version.manifest.files:
        if entry.path == path:
            return entry
    known = [entry.path for entry in version.manifest.files]
    raise ArtifactNotFound(f"{version.ref} has no file {path!r}; it has {known}", "path")


def _audience() -> str:
    """Who may share a cached answer: where there are keys, nobody."""
    return "public" if current().key is ANYBODY else "private"


def _is_fixed(name: str, ref: str) -> bool:
    """Whether a reference means the same for ever: a number or a digest does, an alias doesn't."""
    return ref != LATEST and parse_reference(f"{name}@{ref}").alias is None
