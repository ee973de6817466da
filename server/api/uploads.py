"""Reads a multipart upload of a manifest and files, in bounded memory: beyond a megabyte, a part goes to the disk."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import BinaryIO, NamedTuple

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from server.api.errors import ApiError
from steering_store.manifest import MAX_MANIFEST_BYTES

FRAMING_BYTES = 1 << 16
# How the parser begins the messages of its own limits; all else that it refuses is malformed.
_LIMIT_MESSAGES = ("Too many", "Part exceeded")


class Upload(NamedTuple):
    """A manifest as it was sent, and open files by file name."""

    manifest: str | bytes
    files: dict[str, BinaryIO]


class _BodyTooLarge(MultiPartException):
    """The body passed the limit while it was read; of the parser's own kind, so that it closes its files."""


@asynccontextmanager
async def read_upload(request: Request, *, max_bytes: int, max_files: int) -> AsyncIterator[Upload]:
    """Parse the body; the files are closed at the end. Raises ApiError 400, 413, 415 or 422."""
    form = await _parse(request, max_bytes + MAX_MANIFEST_BYTES + FRAMING_BYTES, max_files)
    try:
        yield Upload(await _manifest(form), _files(form))
    finally:
        await form.close()


async def _parse(request: Request, limit: int, max_files: int) -> FormData:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(415, "send multipart/form-data, with a part 'manifest' and one part per file")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > limit:
        raise ApiError(413, f"the body has {length} bytes, and at most {limit} are accepted", "files")
    # One file for the manifest, and one too many for the store, which then says so.
    parser = MultiPartParser(
        request.headers, _limited(request, limit), max_files=max_files + 2, max_part_size=MAX_MANIFEST_BYTES
    )
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


def _files(form: FormData) -> dict[str, BinaryIO]:
    files: dict[str, BinaryIO] = {}
    for field, part in form.multi_items():
        if field == "manifest":
            continue
        if not isinstance(part, UploadFile):
            raise ApiError(422, f"part {field!r} is not a file; send it with a file name, or leave it out", field)
        path = part.filename or ""
        if path in files:
            raise ApiError(422, f"file {path!r} was sent twice; send it once", "files")
        files[path] = part.file
    return files
