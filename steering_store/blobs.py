"""Bytes on the disk, found by their SHA-256: written aside, made durable, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from steering_store.errors import CorruptArtifact, StoreFull, TooLarge
from steering_store.manifest import FileEntry

Source = Path | bytes | BinaryIO

CHUNK_BYTES = 1 << 20
STALE_SECONDS = 3600.0


@dataclass(frozen=True)
class StagedFile:
    """A file received in full and durable, but not yet part of anything."""

    path: Path
    size: int
    sha256: str


class Blobs:
    """The folders `tmp/` and `blobs/sha256/ab/` of a store. Any number of processes may use them at once."""

    def __init__(self, root: Path) -> None:
        self._tmp = root / "tmp"
        self._blobs = root / "blobs" / "sha256"
        for folder in (self._tmp, self._blobs):
            folder.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def stage(self, source: Source, limit: int) -> StagedFile:
        """Copy a source to `tmp/` while hashing it. Raises TooLarge beyond `limit` bytes, StoreFull."""
        path = self._tmp / uuid.uuid4().hex
        hasher = hashlib.sha256()
        size = 0
        try:
            with _full_disk_named(), _reader(source) as reader, path.open("xb") as writer:
                while chunk := reader.read(CHUNK_BYTES):
                    size += len(chunk)
                    if size > limit:
                        raise TooLarge("files: larger together than the store accepts; publish smaller ones", "files")
                    hasher.update(chunk)
                    writer.write(chunk)
                writer.flush()
                os.fsync(writer.fileno())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        return StagedFile(path, size, hasher.hexdigest())

    def adopt(self, staged: StagedFile) -> None:
        """Move a staged file to its place, durably. Replaces a blob of that digest, which mends a damaged one."""
        target = self.path(staged.sha256)
        with _full_disk_named():
            target.parent.mkdir(exist_ok=True)
            os.replace(staged.path, target)
            fsync(target.parent)
            fsync(self._blobs)

    def path(self, sha256: str) -> Path:
        """Where the bytes with this digest (hex) lie."""
        return self._blobs / sha256[:2] / sha256

    def read(self, entry: FileEntry) -> bytes:
        """The bytes of a file, the very ones that were hashed. Raises CorruptArtifact."""
        try:
            data = self.path(entry.sha256).read_bytes()
        except FileNotFoundError:
            raise _corrupt(entry, "is missing") from None
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise _corrupt(entry, "no longer has the bytes that were published")
        return data

    def verified_path(self, entry: FileEntry) -> Path:
        """The path of a file, hashed just now. Raises CorruptArtifact."""
        path = self.path(entry.sha256)
        try:
            with path.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except FileNotFoundError:
            raise _corrupt(entry, "is missing") from None
        if found != entry.sha256:
            raise _corrupt(entry, "no longer has the bytes that were published")
        return path

    def _sweep(self) -> None:
        # Only a process that died leaves a file here for so long: one that still writes keeps its mtime fresh.
        oldest = time.time() - STALE_SECONDS
        for path in self._tmp.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


def _reader(source: Source) -> contextlib.AbstractContextManager[BinaryIO]:
    if isinstance(source, Path):
        return source.open("rb")
    return BytesIO(source) if isinstance(source, bytes) else contextlib.nullcontext(source)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _full_disk_named() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull("the store's disk is full; free some room and publish again") from exc
        raise


def _corrupt(entry: FileEntry, what: str) -> CorruptArtifact:
    return CorruptArtifact(
        f"file {entry.path!r} (sha256:{entry.sha256}) {what}; restore it, or publish the same bytes again", entry.path
    )
