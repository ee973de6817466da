"""A vector index as a file: it appears whole or not at all, and says what it was made from.

    magic | SHA-256 of the rest | length of the header | header (JSON)
    numbers, seqs: int64 | live: bool | FAISS's own bytes

The header has the collection's uid, the encoder, and the number of the last write that is in the index. A file that is
damaged, or of something else, is never used: the index is made anew from the facts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import faiss
import numpy as np

from kb.index import IndexOptions, VectorIndex

STALE_SECONDS = 3600.0
MAGIC = b"polyhelm-index-1\n"


class BadSnapshot(Exception):
    """A file that can't be used; the message says why."""


class Packed(NamedTuple):
    """An index as it was at one moment."""

    header: dict[str, Any]
    parts: list[np.ndarray]


def pack(index: VectorIndex) -> Packed:
    """A copy of the index, which must not change meanwhile."""
    state = index.state()
    parts = [state[name].copy() for name in ("numbers", "seqs", "live")]
    parts.append(faiss.serialize_index(index.inner))
    return Packed({"last_seq": index.last_seq, "count": index.count, "facts": index.facts}, parts)


def write(path: Path, packed: Packed, made_from: dict[str, Any]) -> int:
    """Put the index into the file, durably; its size in bytes. `made_from` is what `read` must be told again."""
    raw = json.dumps({**made_from, **packed.header}).encode()
    parts: list[Any] = [len(raw).to_bytes(8, "little"), raw, *(part.data.cast("B") for part in packed.parts)]
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with aside.open("xb") as file:
            file.write(MAGIC + _sha256(parts))
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size


def read(path: Path, made_from: dict[str, Any], options: IndexOptions) -> VectorIndex:
    """The index of the file. Raises FileNotFoundError, BadSnapshot."""
    raw = np.fromfile(path, np.uint8)
    header, body = _header(raw)
    differing = [key for key, value in made_from.items() if header.get(key) != value]
    if differing:
        raise BadSnapshot(f"it is of another {differing[0]}")
    count = header["count"]
    numbers, seqs = (body[start * count : (start + 8) * count].view(np.int64).copy() for start in (0, 8))
    live = body[16 * count : 17 * count].view(bool).copy()
    index = VectorIndex.restored(options, faiss.deserialize_index(body[17 * count :]), numbers, seqs, live)
    index.last_seq, index.token = header["last_seq"], header.get("token")
    return index


def sweep(folder: Path, keep: set[str]) -> None:
    """Remove what no collection needs, and what a process that died has left."""
    for path in folder.glob("*.index*"):
        with contextlib.suppress(FileNotFoundError):
            stale = path.stat().st_mtime < time.time() - STALE_SECONDS
            if path.suffix == ".tmp" and stale or path.name.partition(".")[0] not in keep:
                path.unlink()


def _header(raw: np.ndarray) -> tuple[dict[str, Any], np.ndarray]:
    """The header and what is behind it, of a file that is whole."""
    start = len(MAGIC) + hashlib.sha256().digest_size
    if raw[: len(MAGIC)].tobytes() != MAGIC:
        raise BadSnapshot("it isn't a snapshot of this release")
    if _sha256([raw[start:].data]) != raw[len(MAGIC) : start].tobytes():
        raise BadSnapshot("its bytes aren't those that were written")
    end = start + 8 + int.from_bytes(raw[start : start + 8].tobytes(), "little")
    return json.loads(raw[start + 8 : end].tobytes()), raw[end:]


def _sha256(parts: Sequence[bytes | memoryview]) -> bytes:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.digest()
