"""Reads numpy's .npz archives without trusting them: no pickles, and no array larger than the bytes that are there.

An archive is a zip file of `NAME.npy` members: magic, version, length of the header, header, data. The header is a
Python dictionary of dtype, order and shape, which numpy always writes in one form.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Collection
from typing import IO, Any, BinaryIO

import numpy as np

from steering_store.errors import InvalidTensor, StoreError, TooLarge
from steering_store.formats.files import check_room, count
from steering_store.tensors import Float32

MAX_READ = 1 << 20
MAX_MEMBERS = 64
MAX_HEADER = 10_000
# Deflate can't do better than 1032 to 1.
MAX_RATIO = 1032
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    RuntimeError,
    NotImplementedError,
    ValueError,
    KeyError,
)
"""What zipfile raises for files that are damaged, or made to be."""
_HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[A-Za-z]\d*)', 'fortran_order': (True|False), 'shape': \(([\d, ]{0,64})\), \}\s*"
)
_DTYPES = ("<f2", "<f4", "<f8", ">f2", ">f4", ">f8")


class _SmallReads(io.BufferedIOBase):
    """A stream that gives little at a time: zipfile reads the whole list of members at once, however long it says."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def read(self, size: int | None = -1, /) -> bytes:
        whole = size is None or size < 0
        data = self._stream.read(MAX_READ + 1 if whole else min(size or 0, MAX_READ + 1))
        if len(data) > MAX_READ:
            raise zipfile.BadZipFile("its list of members is too long")
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        return self._stream.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True


def npz_names(stream: BinaryIO, file: str) -> list[str]:
    """The names of the arrays. Raises InvalidTensor or TooLarge."""
    try:
        with _archive(stream, file) as archive:
            return [info.filename.removesuffix(".npy") for info in archive.infolist()]
    except StoreError:
        raise
    except _BROKEN as exc:
        raise _malformed(file, exc) from None


def read_npz(stream: BinaryIO, file: str, wanted: Collection[str], max_bytes: int) -> dict[str, Float32]:
    """The wanted arrays as float32, which together must fit into `max_bytes`. `file` is its name in messages.

    Raises InvalidTensor, naming an array that is missing or no array of floats, or TooLarge.
    """
    try:
        with _archive(stream, file) as archive:
            found = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            room, arrays = max_bytes, {}
            for name in wanted:
                if name not in found:
                    raise InvalidTensor(f"file {file!r} has no array {name!r}; it has {sorted(found)[:8]}", file)
                with archive.open(found[name]) as member:
                    arrays[name] = _array(member, found[name], f"{file}/{name}", room)
                room -= arrays[name].nbytes
            return arrays
    except StoreError:
        raise
    except _BROKEN as exc:
        raise _malformed(file, exc) from None


def _archive(stream: BinaryIO, file: str) -> zipfile.ZipFile:
    archive = zipfile.ZipFile(_SmallReads(stream))
    if len(archive.infolist()) > MAX_MEMBERS:
        raise TooLarge(f"file {file!r} has {len(archive.infolist())} arrays, and {MAX_MEMBERS} are allowed", file)
    return archive


def _array(member: IO[bytes], info: zipfile.ZipInfo, file: str, room: int) -> Float32:
    shape, fortran, dtype = _npy_header(member, file)
    check_room(count(shape) * 4, file, room)
    size = count(shape) * dtype.itemsize
    if size > info.file_size or info.file_size > max(info.compress_size, 1) * MAX_RATIO:
        raise InvalidTensor(f"array {file!r} says that it has {size} bytes, and hasn't; download the file again", file)
    flat = np.empty(count(shape), np.float32)
    done = 0
    while done < len(flat):
        piece = _exactly(member, min(MAX_READ, (len(flat) - done) * dtype.itemsize))
        with np.errstate(over="ignore"):
            values = np.frombuffer(piece, dtype).astype(np.float32)
        flat[done : done + len(values)] = values
        done += len(values)
    if member.read(1):
        raise InvalidTensor(f"array {file!r} is longer than it says; download the file again", file)
    return flat.reshape(shape, order="F" if fortran else "C")


def _npy_header(member: IO[bytes], file: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    start = _exactly(member, 8)
    if start[:6] != b"\x93NUMPY" or start[6] not in (1, 2):
        raise ValueError("a member isn't a .npy file of version 1 or 2")
    width = 2 * start[6]
    length = int.from_bytes(_exactly(member, width), "little")
    if length > MAX_HEADER:
        raise ValueError("the header of an array is too long")
    match = _HEADER.fullmatch(_exactly(member, length))
    if match is None:
        raise ValueError("the header of an array isn't as numpy writes it")
    if (dtype := match[1].decode()) not in _DTYPES:
        raise InvalidTensor(f"array {file!r} is of dtype {dtype}; convert it to float32", file)
    shape = tuple(int(size) for size in match[3].split(b",") if size.strip())
    return shape, match[2] == b"True", np.dtype(dtype)


def _exactly(member: IO[bytes], size: int) -> bytes:
    piece = bytearray()
    while len(piece) < size:
        more = member.read(size - len(piece))
        if not more:
            raise EOFError("an array is cut off")
        piece += more
    return bytes(piece)


def _malformed(file: str, exc: Exception) -> InvalidTensor:
    return InvalidTensor(f"file {file!r} is not a whole .npz file: {str(exc)[:200]}; download it again", file)
