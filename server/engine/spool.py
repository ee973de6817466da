"""Captured activations on their way from a worker to whoever asked: a file of rows, and tensors made of its pieces.

A worker that may not hold more rows writes them to a `Spool`, all sites into one file, as they come. What a worker left
behind of a tensor is a `Part`; a `Stored` tensor joins the parts of several ranks. Nothing is read before it is sent.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import uuid
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

import numpy as np

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8}
"""By safetensors' names of types."""
NUMPY = {"F32": "<f4", "F16": "<f2", "I64": "<i8"}
BLOCK_BYTES = 1 << 20

Extent = tuple[int, int]
"""Where a run of rows begins in a file, in bytes, and how many rows it has."""


FailureKind = Literal["dtype", "disk", "lost"]


class CaptureFailed(RuntimeError):
    """The activations couldn't be kept: they don't fit the type, the disk takes no more, or tokens are missing."""

    def __init__(self, message: str, kind: FailureKind) -> None:
        super().__init__(message)
        self.kind = kind


class Spool:
    """A file that is written from its beginning to its end. It goes with this object, unless it is handed over."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / f"{uuid.uuid4().hex}.rows"
        # Unbuffered: a write that fails must fail where it is made, and not when the file is closed.
        self._file = self.path.open("xb", buffering=0)
        self._size = 0
        self._remove = weakref.finalize(self, _discard, self._file, self.path)

    def write(self, data: memoryview) -> int:
        """Append, and return where it begins. OSError where the disk is full or the folder is gone."""
        start = self._size
        while len(data):
            written = self._file.write(data) or 0
            self._size += written
            data = data[written:]
        return start

    def hand_over(self) -> Path:
        """Close the file and leave it to whoever has its path."""
        self._file.close()
        self._remove.detach()
        return self.path

    def close(self) -> None:
        self._remove()


def _discard(file: io.FileIO, path: Path) -> None:
    path.unlink(missing_ok=True)
    file.close()


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor [rows, width], [width] or [] as one worker left it: rows in `source`, a buffer or the path of a file."""

    dtype: str
    shape: tuple[int, ...]
    source: bytes | Path
    extents: tuple[Extent, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def row_bytes(self) -> int:
        return (self.shape[-1] if self.shape else 1) * ITEM_BYTES[self.dtype]

    def open(self) -> BinaryIO:
        return io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")

    def read(self, file: BinaryIO, first: int, count: int) -> np.ndarray:
        """Rows [first, first + count) as bytes, uint8 [count, row_bytes], from the open source."""
        pieces, passed = [], 0
        for offset, rows in self.extents:
            start, end = max(first, passed) - passed, min(first + count, passed + rows) - passed
            if start < end:
                file.seek(offset + start * self.row_bytes)
                pieces.append(file.read((end - start) * self.row_bytes))
            passed += rows
        return np.frombuffer(b"".join(pieces), np.uint8).reshape(count, self.row_bytes)


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor whose width is cut into parts of several ranks; mostly there is one."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, array: np.ndarray) -> Stored:
        """An int64 vector."""
        data = np.ascontiguousarray(array, "<i8").tobytes()
        return cls((Part("I64", array.shape, data, ((0, 1),)),))

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        if len(self.parts) == 1:
            return self.parts[0].shape
        return (*self.parts[0].shape[:-1], sum(part.shape[-1] for part in self.parts))

    @property
    def nbytes(self) -> int:
        return self.parts[0].rows * sum(part.row_bytes for part in self.parts)

    def blocks(self) -> Iterator[bytes]:
        """Its bytes, row by row, in blocks of about a MiB."""
        rows, step = self.parts[0].rows, max(1, BLOCK_BYTES // max(1, sum(part.row_bytes for part in self.parts)))
        with ExitStack() as stack:
            files = [stack.enter_context(part.open()) for part in self.parts]
            for first in range(0, rows, step):
                count = min(step, rows - first)
                read = [part.read(file, first, count) for part, file in zip(self.parts, files, strict=True)]
                yield (read[0] if len(read) == 1 else np.concatenate(read, axis=1)).tobytes()

    def numpy(self) -> np.ndarray:
        """The whole tensor. KeyError for bfloat16, which numpy doesn't have."""
        return np.frombuffer(b"".join(self.blocks()), NUMPY[self.dtype]).reshape(self.shape)


def parts(answer: bytes | Mapping[str, Any]) -> dict[str, Part]:
    """By name, what `Capture.collect` answered. Raises CaptureFailed where that says so."""
    if isinstance(answer, bytes):
        size = int.from_bytes(answer[:8], "little")
        header = json.loads(answer[8 : 8 + size])
        return {name: _in_buffer(fields, answer, 8 + size) for name, fields in header.items() if name != "__metadata__"}
    if "error" in answer:
        raise CaptureFailed(answer["error"], answer["kind"])
    path = Path(answer["path"])
    return {
        name: Part(fields["dtype"], tuple(fields["shape"]), path, tuple((at, rows) for at, rows in fields["extents"]))
        for name, fields in answer["tensors"].items()
    }


def _in_buffer(fields: Mapping[str, Any], buffer: bytes, start: int) -> Part:
    shape = tuple(fields["shape"])
    rows = shape[0] if len(shape) == 2 else 1
    return Part(fields["dtype"], shape, buffer, ((start + fields["data_offsets"][0], rows),))


def joined(
    answers: Iterable[bytes | Mapping[str, Any] | None], points: Mapping[str, Mapping[str, Any]]
) -> dict[str, Stored]:
    """By name, what several workers answered; `points` says over how many ranks each point is split."""
    found: dict[str, list[Part]] = {}
    for answer in answers:
        for name, part in parts(answer).items() if answer is not None else ():
            found.setdefault(name, []).append(part)
    stored = {}
    for name, each in found.items():
        point, _, rest = name.partition(".")
        if points[point]["shards"] == 1:
            stored[name] = Stored((each[0],))
        elif not rest.endswith(".norm"):  # a rank's norm is that of its part, and says nothing of the whole
            stored[name] = Stored(tuple(each))
    return stored


def safetensors_file(tensors: Mapping[str, Stored], metadata: Mapping[str, str]) -> tuple[int, Iterator[bytes]]:
    """The size of a safetensors file, and its bytes in blocks."""
    # Wider types first, so that every tensor is aligned.
    order = sorted(tensors, key=lambda name: -ITEM_BYTES[tensors[name].dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        tensor = tensors[name]
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def blocks() -> Iterator[bytes]:
        yield len(text).to_bytes(8, "little") + text
        for name in order:
            yield from tensors[name].blocks()

    return 8 + len(text) + end, blocks()


class Spools:
    """`<data-dir>/captures`: a folder of this process, in which every capture that is under way has one.

    The process holds a lock on its own as long as it lives; those that no process holds are removed.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder, wait=True):
            for stale in folder.iterdir():
                if stale.is_dir():
                    _sweep(stale)
            self.own = folder / uuid.uuid4().hex
            self.own.mkdir()
            lock = _lock(self.own, wait=False)
        # Also at the end of the process.
        self.close = weakref.finalize(self, _remove, self.own, lock)

    def new(self) -> TemporaryDirectory[str]:
        """A folder for one capture, which goes with the object."""
        return TemporaryDirectory(dir=self.own)


def _sweep(stale: Path) -> None:
    try:
        with _locked(stale, wait=False):
            shutil.rmtree(stale)
    except BlockingIOError:
        return  # another server, with the same data directory, is alive


def _remove(folder: Path, lock: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _lock(folder: Path, *, wait: bool) -> int:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _locked(folder: Path, *, wait: bool) -> ExitStack:
    stack = ExitStack()
    stack.callback(os.close, _lock(folder, wait=wait))
    return stack
