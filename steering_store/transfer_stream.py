"""A file on its way from elsewhere: nothing but the bytes that its entry in the manifest promises."""

from __future__ import annotations

import hashlib
import io
from typing import BinaryIO

from steering_store.blobs import check_hash, corrupt
from steering_store.manifest import FileEntry


class VerifiedReader(io.RawIOBase):
    """Reads a file of an artifact from a stream that stands at its beginning. Never reads behind its end.

    Raises CorruptArtifact, where the stream ends too early or at the end where the digest differs.
    """

    def __init__(self, stream: BinaryIO, entry: FileEntry) -> None:
        self._stream = stream
        self._entry = entry
        self._left = entry.size
        self._hasher = hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        wanted = self._left if size < 0 else min(size, self._left)
        data = self._stream.read(wanted) if wanted else b""
        if len(data) < wanted and not data:
            raise corrupt(self._entry, "ends too early where it comes from")
        self._left -= len(data)
        self._hasher.update(data)
        if not self._left:
            check_hash(self._entry, self._hasher.hexdigest())
        return data

    def readable(self) -> bool:
        return True
