"""Reads a multipart upload of a manifest and files, in bounded memory: each file goes into the store's own folder.

The system's temporary folder isn't for that: in a container it is memory, or small.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import BinaryIO, NamedTuple, cast

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from server.api.errors import ApiError
from server.tenants import TenantStore
from steering_store.blobs import Incoming
from steering_store.manifest import MAX_MANIFEST_BYTES

FRAMING_BYTES = 1 << 16
# How the parser begins the messages of its own limits; all else that it refuses is malformed.
_LIMIT_MESSAGES = ("Too many", "Part exceeded")


class Upload(NamedTuple):
    """A manifest as it was sent, and open files by file name."""

    manifest: str | bytes
    files: dict[str, Incoming]


class _BodyTooLarge(MultiPartException):
    """The body passed the limit while it was read; of the parser's own kind, so that it closes its files."""


class _Parser(MultiPartParser):
    """The parser, with another place for the files than the one that it knows."""

    def __init__(
        self, request: Request, stream: AsyncGenerator[bytes, None], opened: Callable[[], Incoming], max_files: int
    ) -> None:
        super().__init__(request.headers, stream, max_files=max_files, max_part_size=MAX_MANIFEST_BYTES)
        self._opened = opened

    def on_headers_finished(self) -> None:
        super().on_headers_finished()
        part = self._current_part
        if part.file is not None:
            # Nothing was written to its own one yet.
            self._files_to_close_on_error.pop().close()
            file = self._opened()
            self._files_to_close_on_error.append(file)  # type: ignore[arg-type]
            part.file = UploadFile(cast(BinaryIO, file), size=0, filename=part.file.filename, headers=part.file.headers)


@asynccontextmanager
async def read_upload(request: Request, store: TenantStore) -> AsyncIterator[Upload]:
    """Parse the body; the files are closed at the end. Raises ApiError 400, 413, 415 or 422, StoreFull."""
    form = await _parse(request, store)
    try:
        yield Upload(await _manifest(form), _files(form))
    finally:
        await form.close()


async def _parse(request: Request, store: TenantStore) -> FormData:
    limit = store.max_bytes + MAX_MANIFEST_BYTES + FRAMING_BYTES
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "send multipart/form-data, with a part 'manifest' and one part per file")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise ApiError(413, f"the body has {length} bytes, and at most {limit} are accepted", "files")
    # One file for the manifest, and one too many for the store, which then says so.
    parser = _Parser(request, _limited(request, limit), store.incoming, store.max_files + 2)
    try:
        return await parser.parse()
    except _BodyTooLarge as exc:
        raise ApiError(413, exc.message, "files") from None
    except MultiPartException as exc:
        raise ApiError(
            413 if exc.message.startswith(_LIMIT_MESSAGES) else 400, f"multipart body: {exc.message}"
        ) from None
    except KeyError:
        raise ApiError(400, "multipart body: the Content-Type header has no boundary") from None


async def _limited(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit:
            raise _BodyTooLarge(f"the body has more than {limit} bytes; publish smaller files")
        yield chunk


async def _manifest(form: FormData) -> str | bytes:
    parts = form.getlist("manifest")
    if len(parts) != 1:
        raise ApiError(
            422, f"{len(parts)} parts are called 'manifest'; send one, with the manifest as JSON", "manifest"
        )
    part = parts[0]
    return await part.read(MAX_MANIFEST_BYTES + 1) if isinstance(part, UploadFile) else part


def _files(form: FormData) -> dict[str, Incoming]:
    files: dict[str, Incoming] = {}
    for field, part in form.multi_items():
        if field == "manifest":
            continue
        if not isinstance(part, UploadFile):
            raise ApiError(422, f"part {field!r} is not a file; send it with a file name, or leave it out", field)
        path = part.filename or ""
        if path in files:
            raise ApiError(422, f"file {path!r} was sent twice; send it once", "files")
        files[path] = cast(Incoming, part.file)
    return files
