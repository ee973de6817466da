"""Opens safetensors files without trusting them: header first, then values, in pieces.

The format: 8 bytes of header length (little-endian), a JSON header `{name: {dtype, shape, data_offsets}}`, the data.
numpy knows no bfloat16, so values are read here: the upper half of a float32's bits is a bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError
from pydantic_core import from_json

from steering_store.errors import InvalidTensor, TooLarge
from steering_store.kind_rules import INTEGERS, is_indices, may_be_zero
from steering_store.manifest import Manifest
from steering_store.reference import pickle_refused

Float32 = npt.NDArray[np.float32]
Tensor = npt.NDArray[np.float32 | np.int64]
"""Floating tensors are read as float32, integers as int64."""

MAX_HEADER_BYTES = 1 << 21
"""Parsed, a header takes about twenty times that. A manifest, which lists every tensor too, is at most half as long."""
CHUNK_BYTES = 1 << 22
_STORED_AS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
_PICKLE_STARTS = (b"PK\x03\x04", b"\x80")


class _HeaderEntry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    dtype: str
    shape: list[NonNegativeInt]
    data_offsets: list[NonNegativeInt] = Field(min_length=2, max_length=2)


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file: `start` and `size` are bytes, from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Header(NamedTuple):
    """Which tensors a file holds, and what is said of it besides."""

    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(stream: BinaryIO, file: str, limit: int = MAX_HEADER_BYTES) -> dict[str, TensorEntry]:
    """Read which tensors a safetensors stream holds; every byte of it must belong to one of them.

    `file` is its name in messages. Raises InvalidTensor, TooLarge for a header beyond `limit` bytes, or UnsupportedFile
    for a pickle in disguise.
    """
    return read_whole_header(stream, file, limit).tensors


def read_whole_header(stream: BinaryIO, file: str, limit: int = MAX_HEADER_BYTES) -> Header:
    """The header with its metadata; as `read_header` otherwise."""
    total = stream.seek(0, 2)
    stream.seek(0)
    prefix = stream.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > total - 8:
        if prefix.startswith(_PICKLE_STARTS):
            raise pickle_refused(file)
        raise _malformed(file, "it is truncated")
    if length > limit:
        raise TooLarge(
            f"file {file!r}: its header has {length} bytes, and at most {limit} are accepted; write fewer "
            "tensors into it, or less metadata",
            "files",
        )
    entries, metadata = _parse_header(stream.read(length), file)
    begin = 8 + length
    tensors = {name: _entry(file, name, entry, begin) for name, entry in entries.items()}
    _check_extent(file, tensors, begin, total)
    return Header(tensors, metadata)


def check_tensors(manifest: Manifest, paths: Mapping[str, Path]) -> None:
    """Check that the files hold the manifest's tensors, all of them and no others, with finite values only, and
    indices that are inside the activation and differ.

    Raises InvalidTensor, which names the file, the tensor and the manifest's field.
    """
    indices = {site.tensor for site in manifest.sites if is_indices(manifest.kind, site.role)}
    zero = may_be_zero(manifest)
    for file, path in paths.items():
        with path.open("rb") as stream:
            tensors = read_header(stream, file)
            _check_against(manifest, file, tensors)
            for name, entry in tensors.items():
                if name in indices:
                    _check_indices(_whole(stream, entry), file, name, manifest.width)
                else:
                    _check_values(_values(stream, entry), file, name, may_be_zero=name in zero)


def _check_values(pieces: Iterator[Tensor], file: str, name: str, *, may_be_zero: bool) -> None:
    nothing = True
    for values in pieces:
        nothing = nothing and not values.any()
        if not np.isfinite(values).all():
            raise InvalidTensor(
                f"file {file!r}: tensor {name!r} holds NaN, infinity or values beyond float32; refit it", "files"
            )
    if nothing and not may_be_zero:
        raise InvalidTensor(
            f"file {file!r}: tensor {name!r} is all zeros and would steer nothing; leave its site out", "files"
        )


def _check_indices(indices: Tensor, file: str, name: str, width: int) -> None:
    if ((indices < 0) | (indices >= width)).any():
        raise InvalidTensor(f"file {file!r}: tensor {name!r} holds indices outside 0 to {width - 1}; refit it", "files")
    if len(np.unique(indices)) < len(indices):
        raise InvalidTensor(f"file {file!r}: tensor {name!r} holds an index twice; list each once", "files")


def read_tensors(
    source: Path | bytes | BinaryIO,
    wanted: Mapping[str, Sequence[int] | None] | None = None,
    header_limit: int = MAX_HEADER_BYTES,
) -> dict[str, Tensor]:
    """Read tensors of a safetensors file, or of its bytes; all of them, or those `wanted`, by name.

    With rows given for a tensor, only these are read, so that a few rows of a large one cost little memory. Raises
    InvalidTensor, KeyError for a wanted tensor that isn't there, and IndexError for such a row.
    """
    file = source.name if isinstance(source, Path) else "<bytes>"
    with _opened(source) as stream:
        entries = read_header(stream, file, header_limit)
        names: Mapping[str, Sequence[int] | None] = dict.fromkeys(entries) if wanted is None else wanted
        return {
            name: _whole(stream, entries[name]) if rows is None else _rows(stream, entries[name], rows)
            for name, rows in names.items()
        }


def read_hashed(stream: BinaryIO, file: str) -> tuple[dict[str, Tensor], str]:
    """Every tensor of a safetensors stream, and the SHA-256 (hex) of the very bytes that they were made of.

    The tensors are written straight into their arrays, so that nothing is in memory twice. Raises InvalidTensor.
    """
    entries = read_header(stream, file)
    stream.seek(0)
    hasher = hashlib.sha256(stream.read(min((entry.start for entry in entries.values()), default=-1)))
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        tensors[name] = _whole(stream, entry, hasher.update)
    return {name: tensors[name] for name in entries}, hasher.hexdigest()


def _opened(source: Path | bytes | BinaryIO) -> contextlib.AbstractContextManager[BinaryIO]:
    if isinstance(source, Path):
        return source.open("rb")
    return BytesIO(source) if isinstance(source, bytes) else contextlib.nullcontext(source)


def _parse_header(raw: bytes, file: str) -> tuple[dict[str, _HeaderEntry], dict[str, str]]:
    name = ""
    try:
        content = from_json(raw)
        if not isinstance(content, dict):
            raise ValueError("its header is not a JSON object")
        metadata = content.pop("__metadata__", None)
        said = metadata if isinstance(metadata, dict) else {}
        # One by one, so that the first that is wrong is the only one that is told of: of all, errors fill the memory.
        entries = {(name := key): _HeaderEntry.model_validate(entry) for key, entry in content.items()}
        return entries, {key: value for key, value in said.items() if isinstance(value, str)}
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in (name, *error["loc"]))
        raise _malformed(file, f"in its header, {where[:200]}: {error['msg']}") from None
    except ValueError as exc:
        raise _malformed(file, f"its header can't be read ({exc})") from None


def _entry(file: str, name: str, entry: _HeaderEntry, begin: int) -> TensorEntry:
    if entry.dtype not in _STORED_AS:
        raise InvalidTensor(
            f"file {file!r}: tensor {name!r} is {entry.dtype}; convert it to one of {', '.join(_STORED_AS)}", "files"
        )
    start, end = entry.data_offsets
    size = math.prod(entry.shape) * np.dtype(_STORED_AS[entry.dtype]).itemsize
    if end - start != size:
        raise _malformed(file, f"tensor {name!r} has {end - start} bytes where its shape needs {size}")
    return TensorEntry(entry.dtype, tuple(entry.shape), begin + start, size)


def _check_extent(file: str, tensors: Mapping[str, TensorEntry], begin: int, total: int) -> None:
    end = begin
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != end:
            raise _malformed(file, f"tensor {name!r} overlaps its neighbour or leaves a gap")
        end += entry.size
    if end != total:
        raise _malformed(file, f"its header describes {end} bytes and the file has {total}: truncated or padded")


def _check_against(manifest: Manifest, file: str, tensors: Mapping[str, TensorEntry]) -> None:
    unclaimed = set(tensors)
    for i, site in enumerate(manifest.sites):
        if site.file != file:
            continue
        found = tensors.get(site.tensor)
        if found is None:
            raise InvalidTensor(
                f"sites.{i}.tensor: file {file!r} has no tensor {site.tensor!r}; it has {sorted(tensors)[:8]}",
                f"sites.{i}.tensor",
            )
        for field, promised, actual in (("shape", site.shape, list(found.shape)), ("dtype", site.dtype, found.dtype)):
            if promised != actual:
                raise InvalidTensor(
                    f"sites.{i}.{field}: the manifest says {promised}, and tensor {site.tensor!r} of file {file!r} "
                    f"has {actual}; correct one of them",
                    f"sites.{i}.{field}",
                )
        unclaimed.discard(site.tensor)
    if unclaimed:
        raise InvalidTensor(
            f"sites: no site uses {sorted(unclaimed)[:8]} of file {file!r}; add sites, or remove them",
            "sites",
        )


def _whole(stream: BinaryIO, entry: TensorEntry, seen: Callable[[bytes], None] | None = None) -> Tensor:
    whole: Tensor = np.empty(math.prod(entry.shape), np.int64 if entry.dtype in INTEGERS else np.float32)
    done = 0
    for values in _values(stream, entry, seen):
        whole[done : done + len(values)] = values
        done += len(values)
    return whole.reshape(entry.shape)


def _rows(stream: BinaryIO, entry: TensorEntry, rows: Sequence[int]) -> Tensor:
    """Rows [len(rows), ...] of a tensor, read one by one."""
    count, *shape = entry.shape
    size = entry.size // max(count, 1)
    taken = []
    for row in rows:
        if not 0 <= row < count:
            raise IndexError(f"row {row} is outside 0 to {count - 1}")
        stream.seek(entry.start + row * size)
        taken.append(_decoded(stream.read(size), entry.dtype))
    return np.stack(taken).reshape(len(rows), *shape)


def _values(stream: BinaryIO, entry: TensorEntry, seen: Callable[[bytes], None] | None = None) -> Iterator[Tensor]:
    """The values, flat, in pieces; `seen` is given the bytes of each."""
    stream.seek(entry.start)
    for done in range(0, entry.size, CHUNK_BYTES):
        raw = stream.read(min(CHUNK_BYTES, entry.size - done))
        if seen is not None:
            seen(raw)
        yield _decoded(raw, entry.dtype)


def _decoded(raw: bytes, dtype: str) -> Tensor:
    values = np.frombuffer(raw, _STORED_AS[dtype])
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    if dtype in INTEGERS:
        return values.astype(np.int64)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)


def _malformed(file: str, reason: str) -> InvalidTensor:
    return InvalidTensor(f"file {file!r} is not a whole safetensors file: {reason}; write it again", "files")
