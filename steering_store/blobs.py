"""Bytes on the disk, found by their SHA-256: written aside, made durable, then renamed into place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

from steering_store.errors import READ_ONLY, CorruptArtifact, StoreFull, StoreReadOnly, TooLarge
from steering_store.manifest import FileEntry

CHUNK_BYTES = 1 << 20
STALE_SECONDS = 3600.0
REMEMBERED_SECONDS = 30.0
MOST_REMEMBERED = 4096


@dataclass(frozen=True)
class StagedFile:
    """A file received in full and durable, but not yet part of anything."""

    path: Path
    size: int
    sha256: str


class Incoming:
    """A file on its way in, to be written once from its beginning to its end: in `tmp/`, and hashed as it comes.

    Close it in any case; unless it was adopted, it is gone then. Raises StoreFull or StoreReadOnly.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hasher = hashlib.sha256()
        self._size = 0

    def write(self, data: bytes) -> int:
        with _disk_named():
            self._stream.write(data)
        self._hasher.update(data)
        self._size += len(data)
        return len(data)

    def read(self, size: int = -1) -> bytes:
        return self._stream.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        with _disk_named():
            return self._stream.seek(offset, whence)

    def close(self) -> None:
        # What is still in its buffer doesn't matter where nobody wants the file.
        with contextlib.suppress(OSError):
            self._stream.close()
        Path(self._stream.name).unlink(missing_ok=True)

    def staged(self, limit: int) -> StagedFile:
        """The file, made durable. Raises TooLarge beyond `limit` bytes."""
        if self._size > limit:
            raise _too_large()
        self._stream.flush()
        os.fsync(self._stream.fileno())
        return StagedFile(Path(self._stream.name), self._size, self._hasher.hexdigest())


Source = Path | bytes | BinaryIO | Incoming


class _Verified(NamedTuple):
    """What a file was like when it was hashed, and when that was."""

    state: tuple[int, ...]
    at: float


def _state(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Blobs:
    """The folders `tmp/` and `blobs/sha256/ab/` of a store. Any number of processes may use them at once."""

    def __init__(self, root: Path) -> None:
        self._tmp = root / "tmp"
        self._blobs = root / "blobs" / "sha256"
        self._verified: dict[str, _Verified] = {}
        for folder in (self._tmp, self._blobs):
            _make(folder)
        self.sweep(time.time() - STALE_SECONDS)

    @contextlib.contextmanager
    def stage(self, source: Source, limit: int) -> Iterator[StagedFile]:
        """Copy a source to `tmp/` while hashing it; removed at the end, unless adopted. What came in is there already.

        Raises TooLarge beyond `limit` bytes, StoreFull.
        """
        if isinstance(source, Incoming):
            with _disk_named():
                yield source.staged(limit)
            return
        with _disk_named(), self._new_tmp() as writer:
            path = Path(writer.name)
            try:
                size, sha256 = _copy(source, writer, limit)
                yield StagedFile(path, size, sha256)
            finally:
                path.unlink(missing_ok=True)

    def incoming(self) -> Incoming:
        """A new file to write to, for `stage`. Raises StoreFull or StoreReadOnly."""
        with _disk_named():
            return Incoming(self._new_tmp())

    def adopt(self, staged: StagedFile) -> None:
        """Move a staged file to its place, durably. Replaces a blob of that digest, which mends a damaged one.

        Call it in the transaction that makes the blob somebody's, or a sweep may take it.
        """
        target = self.path(staged.sha256)
        with _disk_named():
            target.parent.mkdir(exist_ok=True)
            os.replace(staged.path, target)
            fsync(target.parent)
            fsync(self._blobs)

    def path(self, sha256: str) -> Path:
        """Where the bytes with this digest (hex) lie."""
        return self._blobs / sha256[:2] / sha256

    @contextlib.contextmanager
    def open(self, entry: FileEntry) -> Iterator[BinaryIO]:
        """Open a file for reading, not yet verified. Raises CorruptArtifact where it is missing."""
        try:
            stream = self.path(entry.sha256).open("rb")
        except FileNotFoundError:
            raise corrupt(entry, "is missing") from None
        with stream:
            yield stream

    @contextlib.contextmanager
    def open_verified(self, entry: FileEntry) -> Iterator[BinaryIO]:
        """Open a file, hashed just now. Raises CorruptArtifact."""
        with self.open(entry) as stream:
            hasher = hashlib.sha256()
            while chunk := stream.read(CHUNK_BYTES):
                hasher.update(chunk)
            check_hash(entry, hasher.hexdigest())
            stream.seek(0)
            yield stream

    def verified_path(self, entry: FileEntry) -> Path:
        """The path of a file, hashed just now. Raises CorruptArtifact."""
        with self.open_verified(entry) as stream:
            found = os.fstat(stream.fileno())
            if len(self._verified) >= MOST_REMEMBERED:
                self._verified.clear()
            self._verified[entry.sha256] = _Verified(_state(found), time.monotonic())
            return self.path(entry.sha256)

    def recent_path(self, entry: FileEntry) -> Path:
        """The path of a file, hashed in the last `REMEMBERED_SECONDS` and not written to since. Raises CorruptArtifact.

        A file that is read range by range would else be hashed whole for each of them.
        """
        path, known = self.path(entry.sha256), self._verified.get(entry.sha256)
        if known is not None and time.monotonic() - known.at < REMEMBERED_SECONDS:
            with contextlib.suppress(FileNotFoundError):
                if _state(path.stat()) == known.state:
                    return path
        return self.verified_path(entry)

    def all(self) -> Iterator[tuple[str, os.stat_result]]:
        """The digest (hex) of every blob that is there, with its size and time."""
        for folder in sorted(self._blobs.iterdir()):
            for path in sorted(folder.iterdir()):
                with contextlib.suppress(FileNotFoundError):
                    yield path.name, path.stat()

    def refresh(self, sha256: str) -> None:
        """Begin the grace period of a blob anew."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.path(sha256))

    def remove(self, sha256: str) -> None:
        """Remove a blob. Call it in the transaction that saw that nobody needs it."""
        self.path(sha256).unlink(missing_ok=True)

    def sweep(self, older_than: float, *, dry_run: bool = False) -> list[tuple[Path, int]]:
        """Remove the files in `tmp/` of writers that died, last written before `older_than` (seconds since the epoch).

        A writer holds a lock on its file, which its death ends. Returns the files and their sizes in bytes.
        """
        swept = []
        for path in sorted(self._tmp.iterdir()):
            with contextlib.suppress(FileNotFoundError, BlockingIOError), path.open("rb") as stream:
                found = path.stat()
                if found.st_mtime > older_than:
                    continue
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not dry_run:
                    path.unlink()
                swept.append((path, found.st_size))
        return swept

    def _new_tmp(self) -> BinaryIO:
        """A new file in `tmp/` that no sweep takes while it is open."""
        while True:
            stream = (self._tmp / uuid.uuid4().hex).open("x+b")
            fcntl.flock(stream, fcntl.LOCK_SH)
            # A sweep may have come between the two lines above.
            if os.fstat(stream.fileno()).st_nlink:
                return stream
            stream.close()


def check_hash(entry: FileEntry, found: str) -> None:
    """Raise CorruptArtifact where the SHA-256 (hex) of a file isn't the one that was published."""
    if found != entry.sha256:
        raise corrupt(entry, "no longer has the bytes that were published")


def corrupt(entry: FileEntry, what: str) -> CorruptArtifact:
    """The refusal of a file, by its name in the artifact and its digest."""
    return CorruptArtifact(
        f"file {entry.path!r} (sha256:{entry.sha256}) {what}; restore it, or publish the same bytes again", entry.path
    )


def _too_large() -> TooLarge:
    return TooLarge("files: larger together than the store accepts; publish smaller ones", "files")


def _copy(source: Path | bytes | BinaryIO, writer: BinaryIO, limit: int) -> tuple[int, str]:
    """Copy, make durable, and return how many bytes it was and their SHA-256 (hex)."""
    hasher = hashlib.sha256()
    size = 0
    with _reader(source) as reader:
        while chunk := reader.read(CHUNK_BYTES):
            size += len(chunk)
            if size > limit:
                raise _too_large()
            hasher.update(chunk)
            writer.write(chunk)
    writer.flush()
    os.fsync(writer.fileno())
    return size, hasher.hexdigest()


def _reader(source: Path | bytes | BinaryIO) -> contextlib.AbstractContextManager[BinaryIO]:
    if isinstance(source, Path):
        return source.open("rb")
    return BytesIO(source) if isinstance(source, bytes) else contextlib.nullcontext(source)


def _make(folder: Path) -> None:
    """Create a folder and those above it, durably."""
    if not folder.is_dir():
        _make(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)


def fsync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_named() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreFull("the store's disk is full; free some room and publish again") from exc
        if exc.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise StoreReadOnly(READ_ONLY) from exc
        raise
