"""The files of a remote store that are on this disk: fetched when first read, the least recently used removed first."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from steering_store.blobs import Blobs
from steering_store.manifest import FileEntry
from steering_store.remote import RemoteStore

RECENT_SECONDS = 60.0
"""Somebody who was just given a file's path may not have opened it yet."""


class RemoteBlobs(Blobs):
    """Blobs under `root`, at most `max_bytes` of them beside those in use; the others come from the remote store."""

    def __init__(self, root: Path, remote: RemoteStore, max_bytes: int) -> None:
        super().__init__(root)
        self._remote = remote
        self._max_bytes = max_bytes

    @contextmanager
    def open(self, entry: FileEntry) -> Iterator[BinaryIO]:
        """Open a file, fetched first where it isn't here. Raises CorruptArtifact or RemoteUnavailable."""
        if self.path(entry.sha256).exists():
            self.refresh(entry.sha256)
        else:
            self._fetch(entry)
        with super().open(entry) as stream:
            yield stream

    def make_room(self) -> None:
        """Remove files until the rest is small enough. Open ones stay readable, and all can be fetched again."""
        found = sorted(self.all(), key=lambda item: item[1].st_mtime)
        size = sum(stat.st_size for _, stat in found)
        newest = time.time() - RECENT_SECONDS
        for sha256, stat in found:
            if size <= self._max_bytes or stat.st_mtime > newest:
                return
            self.remove(sha256)
            size -= stat.st_size

    def _fetch(self, entry: FileEntry) -> None:
        with self._remote.open_file(entry) as stream, self.stage(stream, entry.size) as staged:
            self.adopt(staged)
        self.make_room()
