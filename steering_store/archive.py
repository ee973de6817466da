"""One artifact as one file: an uncompressed tar of the manifest and the files, of which every byte is determined.

`manifest.json`, in canonical form, comes first, and then the files as the manifest lists them; owner, time and mode are
the same in each. An archive is accepted only where it is what an export would write. So nothing in it is interpreted
but the manifest: there are no paths to escape by, no links, and no sizes but those that the manifest declares.
"""

from __future__ import annotations

import contextlib
import tarfile
from pathlib import Path
from typing import BinaryIO, cast

from steering_store.blobs import CHUNK_BYTES
from steering_store.errors import StoreError, TooLarge
from steering_store.manifest import MAX_MANIFEST_BYTES, Manifest, read_published
from steering_store.records import ArtifactVersion, Publication
from steering_store.store import Store
from steering_store.transfer_stream import VerifiedReader

MANIFEST = "manifest.json"


class InvalidArchive(StoreError):
    """A file that isn't what an export writes."""


def export_archive(store: Store, version: ArtifactVersion, target: BinaryIO) -> None:
    """Write an artifact as an archive, hashing its files on the way. Raises CorruptArtifact."""
    text = version.text
    written = target.write(_header(MANIFEST, len(text)) + text + _padding(len(text)))
    for entry in version.manifest.files:
        written += target.write(_header(entry.path, entry.size))
        with store.file_path(version, entry.path).open("rb") as stream:
            reader = VerifiedReader(stream, entry)
            while chunk := reader.read(CHUNK_BYTES):
                written += target.write(chunk)
        written += target.write(_padding(entry.size))
    target.write(_end(written))


def import_archive(store: Store, name: str, archive: Path, *, by: str | None = None) -> Publication:
    """Publish an archive as a version of `name`. Raises InvalidArchive, and what Store.publish raises."""
    with archive.open("rb") as stream, contextlib.ExitStack() as opened:
        text, manifest = _read_manifest(stream, archive)
        if len(manifest.files) > store.max_files:
            raise TooLarge(f"files: {len(manifest.files)} of them, and at most {store.max_files} are accepted", "files")
        files = {}
        for entry in manifest.files:
            _expect(stream, archive, _header(entry.path, entry.size), f"the header of {entry.path!r}")
            # A stream of its own for each file: they are read later, and in whatever order.
            content = opened.enter_context(archive.open("rb"))
            content.seek(stream.tell())
            files[entry.path] = cast(BinaryIO, VerifiedReader(content, entry))
            stream.seek(entry.size, 1)
            _expect(stream, archive, _padding(entry.size), f"the padding of {entry.path!r}")
        _expect(stream, archive, _end(stream.tell()), "the end")
        if stream.read(1):
            raise _refused(archive, "something follows the end")
        return store.publish_copy(name, text, files, by=by)


def _read_manifest(stream: BinaryIO, archive: Path) -> tuple[bytes, Manifest]:
    header = stream.read(tarfile.BLOCKSIZE)
    try:
        size = tarfile.TarInfo.frombuf(header, "utf-8", "strict").size
    except (tarfile.HeaderError, UnicodeDecodeError) as exc:
        raise _refused(archive, f"it isn't a tar ({exc})") from None
    if not 0 <= size <= MAX_MANIFEST_BYTES:
        raise TooLarge(f"{archive.name}: a manifest of {size} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
    stream.seek(0)
    _expect(stream, archive, _header(MANIFEST, size), f"{MANIFEST}, which comes first,")
    text = stream.read(size)
    manifest = read_published(text)
    _expect(stream, archive, _padding(size), "the padding of the manifest")
    return text, manifest


def _expect(stream: BinaryIO, archive: Path, expected: bytes, what: str) -> None:
    if stream.read(len(expected)) != expected:
        raise _refused(archive, f"{what} differs, or is missing")


def _refused(archive: Path, why: str) -> InvalidArchive:
    return InvalidArchive(
        f"{archive.name} is not as `polyhelm artifact export` writes it: {why}; export it again, or unpack it and "
        "publish its files"
    )


def _header(path: str, size: int) -> bytes:
    member = tarfile.TarInfo(path)
    member.size = size
    # Of the formats, the one that puts any size into a single block.
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "strict")


def _padding(size: int) -> bytes:
    return bytes(-size % tarfile.BLOCKSIZE)


def _end(written: int) -> bytes:
    empty = 2 * tarfile.BLOCKSIZE
    return bytes(empty + -(written + empty) % tarfile.RECORDSIZE)
