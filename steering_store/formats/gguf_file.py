"""Reads gguf files without trusting them: the header from its first megabyte, then only tensors that lie in the file.

The format: "GGUF", version, counts of tensors and of keys; the keys `name, type, value`; the tensors `name, dimensions,
type, offset`; padding to `general.alignment`; the data. Everything is little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from steering_store.errors import InvalidTensor, TooLarge
from steering_store.formats.files import check_room, count
from steering_store.tensors import Float32

MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 4096
DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FLOATS = {0: "<f4", 1: "<f2", 28: "<f8", 30: "<u2"}
"""ggml's F32, F16, F64 and BF16; numpy has no bfloat16, which is the upper half of a float32's bits."""
_BF16 = 30

Value = str | int | float | bool | None
"""A key's value; None for a list, of which only the length matters here."""


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: `start` in bytes from the beginning of the file; the first dimension varies slowest."""

    shape: tuple[int, ...]
    dtype: int
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return count(self.shape) * np.dtype(_FLOATS[self.dtype]).itemsize


class _Header:
    """Takes values from the beginning of a file, and never more than there is."""

    def __init__(self, raw: bytes, total: int) -> None:
        self._raw = raw
        self._total = total
        self.position = 0

    def take(self, size: int) -> bytes:
        begin, self.position = self.position, self.position + size
        if self.position > len(self._raw):
            cut = len(self._raw) < self._total
            raise ValueError("its header is longer than a megabyte" if cut else "it is cut off")
        return self._raw[begin : self.position]

    def number(self, code: str) -> int | float | bool:
        (value,) = struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))
        assert isinstance(value, int | float)
        return value

    def integer(self, code: str) -> int:
        return int(self.number(code))

    def string(self) -> str:
        return self.take(self.integer("Q")).decode()

    def value(self, kind: int) -> Value:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.number(_code(kind))
        kind, length = self.integer("I"), self.integer("Q")
        if kind == _STRING:
            for _ in range(length):
                self.string()
        else:
            self.take(length * struct.calcsize(f"<{_code(kind)}"))
        return None


def read_gguf_header(stream: BinaryIO, file: str) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
    """The keys and the tensors of a gguf stream. `file` is its name in messages. Raises InvalidTensor or TooLarge."""
    total = stream.seek(0, 2)
    stream.seek(0)
    header = _Header(stream.read(MAX_HEADER_BYTES), total)
    try:
        return _parse(header, file, total)
    except (ValueError, struct.error, UnicodeDecodeError) as exc:
        raise InvalidTensor(f"file {file!r} is not a whole gguf file: {exc}; download it again", file) from None


def read_gguf(stream: BinaryIO, file: str, tensors: dict[str, GgufTensor], max_bytes: int) -> dict[str, Float32]:
    """These tensors of a gguf stream as float32, which together must fit into `max_bytes`. Raises TooLarge."""
    check_room(sum(4 * count(tensor.shape) for tensor in tensors.values()), file, max_bytes)
    arrays = {}
    for name, tensor in tensors.items():
        stream.seek(tensor.start)
        values = np.frombuffer(stream.read(tensor.size), _FLOATS[tensor.dtype])
        if tensor.dtype == _BF16:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        with np.errstate(over="ignore"):
            arrays[name] = values.astype(np.float32).reshape(tensor.shape)
    return arrays


def _parse(header: _Header, file: str, total: int) -> tuple[dict[str, Value], dict[str, GgufTensor]]:
    if header.take(4) != b"GGUF":
        raise ValueError("it doesn't begin with GGUF")
    version = header.integer("I")
    if version not in (2, 3):
        raise ValueError(f"its version {version} is unknown, or big-endian")
    tensor_count, key_count = header.integer("Q"), header.integer("Q")
    if tensor_count > MAX_TENSORS:
        raise TooLarge(f"file {file!r} has {tensor_count} tensors, and {MAX_TENSORS} are allowed", file)
    keys: dict[str, Value] = {}
    for _ in range(key_count):
        name = header.string()
        keys[name] = header.value(header.integer("I"))
    entries = [_entry(header) for _ in range(tensor_count)]
    alignment = keys.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {alignment!r}, which is no power of two")
    begin = -(-header.position // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, dtype, offset in entries:
        if name in tensors:
            raise ValueError(f"tensor {name!r} is there twice")
        if dtype not in _FLOATS:
            raise InvalidTensor(f"file {file!r}: tensor {name!r} is quantised (type {dtype}); convert it to F32", file)
        tensors[name] = GgufTensor(shape, dtype, begin + offset)
        if tensors[name].start + tensors[name].size > total:
            raise ValueError(f"tensor {name!r} lies outside it")
    return keys, tensors


def _entry(header: _Header) -> tuple[str, tuple[int, ...], int, int]:
    name, dimensions = header.string(), header.integer("I")
    if dimensions > 4:
        raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
    # ggml lists the fastest dimension first.
    shape = tuple(header.integer("Q") for _ in range(dimensions))[::-1]
    return name, shape, header.integer("I"), header.integer("Q")


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise ValueError(f"a value of the unknown type {kind}")
    return _SCALARS[kind]
