"""Objects at a URL, each created once and never changed: on a disk, in memory or in a bucket, by any fsspec URL.

Only one of several writers creates an object: on a disk by a hard link, on S3 by `If-None-Match: *`. Other file systems
do what their fsspec implementation does for `mode="create"`; where that is "look, then write", two writers at the very
same moment can both believe to be first, so let one of them write at a time.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from steering_store.blobs import fsync
from steering_store.errors import RemoteUnavailable, StoreError, TooLarge

BLOCK_BYTES = 4 << 20
PARALLEL = 16
LOCAL = ("file", "local")
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}")


class Objects:
    """What lies below a URL. Paths are relative to it, with `/`. Safe to use from several threads and processes."""

    def __init__(self, url: str) -> None:
        if "://" not in url or "::" in url:
            raise StoreError(f"store {url!r}: write a URL such as s3://bucket/prefix or file:///folder", "store")
        self.url = url.rstrip("/")
        # Listings must be fresh: other machines write here.
        options = {} if self._is_local else {"use_listings_cache": False}
        try:
            self._fs, root = fsspec.url_to_fs(self.url, **options)
        except (ImportError, ValueError) as exc:
            raise StoreError(f"store {url!r}: {exc}", "store") from exc
        self._root = root.rstrip("/")

    def create(self, path: str, data: bytes) -> bool:
        """Create an object; False, and nothing changed, where it exists."""
        with self._reached(path):
            if self._is_local:
                return self._create_on_disk(path, data)
            try:
                self._fs.pipe_file(self._full(path), data, mode="create")
            except FileExistsError:
                return False
            except FileNotFoundError as exc:
                raise RemoteUnavailable(f"{self.url}: {exc}; create the bucket") from exc
            return True

    def upload(self, path: str, source: Path) -> None:
        """Write a file's bytes, in pieces; whatever was there is replaced."""
        with self._reached(path):
            if self._is_local:
                with _beside(self._on_disk(path)) as stream:
                    _copy(source, stream)
                    os.replace(stream.name, self._on_disk(path))
                    fsync(self._on_disk(path).parent)
            else:
                self._fs.put_file(str(source), self._full(path))

    def read(self, path: str, limit: int) -> bytes:
        """A small object, whole. Raises FileNotFoundError, and TooLarge beyond `limit` bytes."""
        with self.open(path) as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise TooLarge(f"{self.url}/{path}: larger than {limit} bytes", "store")
        return data

    def read_many(self, paths: Sequence[str], limit: int) -> list[bytes]:
        """Small objects, several at a time."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(lambda path: self.read(path, limit), paths))

    @contextlib.contextmanager
    def open(self, path: str) -> Iterator[BinaryIO]:
        """Read an object in pieces. Raises FileNotFoundError."""
        with self._reached(path):
            stream = self._fs.open(self._full(path), "rb", block_size=BLOCK_BYTES)
        with contextlib.closing(stream):
            yield cast(BinaryIO, _Reader(stream, lambda: self._reached(path)))

    def list(self, folder: str) -> list[str]:
        """The paths of all objects below a folder, sorted; none where there is no such folder."""
        with self._reached(folder):
            found = self._fs.find(self._full(folder))
        root = self._root.lstrip("/") + "/"
        paths = sorted(str(each).lstrip("/").removeprefix(root) for each in found)
        return [path for path in paths if not path.rpartition("/")[2].startswith(".")]

    def sweep(self, older_than: float, *, dry_run: bool) -> Sequence[tuple[str, int]]:
        """Remove what writers that died left on a disk, last written before `older_than` (seconds since the epoch).

        Returns the paths and their sizes in bytes. In a bucket nothing is left: what isn't whole isn't there.
        """
        swept: list[tuple[str, int]] = []
        if not self._is_local:
            return swept
        with self._reached(""):
            for path in sorted(Path(self._root).rglob(".*")):
                if not _TEMPORARY.fullmatch(path.name):
                    continue
                with contextlib.suppress(OSError), path.open("rb") as stream:
                    found = os.fstat(stream.fileno())
                    if found.st_mtime <= older_than:
                        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        if not dry_run:
                            path.unlink()
                        swept.append((str(path.relative_to(self._root)), found.st_size))
        return swept

    @property
    def _is_local(self) -> bool:
        return self.url.partition("://")[0] in LOCAL

    def _full(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _on_disk(self, path: str) -> Path:
        return Path(self._full(path))

    def _create_on_disk(self, path: str, data: bytes) -> bool:
        target = self._on_disk(path)
        with _beside(target) as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
            try:
                # Unlike a rename, a link fails where the target exists; unlike mode "x", it shows the object whole.
                os.link(stream.name, target)
            except FileExistsError:
                return False
            fsync(target.parent)
        return True

    @contextlib.contextmanager
    def _reached(self, path: str) -> Iterator[None]:
        try:
            yield
        except (FileNotFoundError, StoreError):
            raise
        # A file system's driver raises exceptions of its own (botocore's, aiohttp's), which have no common class.
        except Exception as exc:
            raise RemoteUnavailable(
                f"{self.url}/{path}: {exc or type(exc).__name__}; check the URL and access"
            ) from exc


class _Reader:
    """Reads, and names the place where that fails."""

    def __init__(self, stream: Any, reached: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._stream = stream
        self._reached = reached

    def read(self, size: int) -> bytes:
        with self._reached():
            return bytes(self._stream.read(size))


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[BinaryIO]:
    """A new file in the target's folder, hidden from lists, gone at the end, and locked until then."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{uuid.uuid4().hex}"
    try:
        with temporary.open("x+b") as stream:
            # Where a disk knows no locks, `sweep` finds none either, and leaves all as it is.
            with contextlib.suppress(OSError):
                fcntl.flock(stream, fcntl.LOCK_SH)
            yield stream
    finally:
        temporary.unlink(missing_ok=True)


def _copy(source: Path, writer: BinaryIO) -> None:
    with source.open("rb") as reader:
        while chunk := reader.read(BLOCK_BYTES):
            writer.write(chunk)
    writer.flush()
    os.fsync(writer.fileno())
