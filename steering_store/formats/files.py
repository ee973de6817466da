"""Opens files that somebody sent: inside one folder only, and never more of them than a limit allows."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from pydantic_core import from_json

from steering_store.errors import InvalidManifest, InvalidTensor, TooLarge, UnsupportedFile
from steering_store.tensors import Float32, TensorEntry, read_header, read_tensors

MAX_JSON_BYTES = 1 << 20
MAX_SAFETENSORS_HEADER = 1 << 20
"""A file of vectors or of one SAE has a few hundred tensors at most."""

Name = Annotated[str, StringConstraints(max_length=200)]
"""A text of a configuration, short enough to be quoted in an error."""

T = TypeVar("T", bound="Config")


class Config(BaseModel):
    """A JSON file that comes with the weights. Fields that aren't listed are ignored."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False, extra="ignore")


class Folder:
    """The folder of one import. Every file is opened through it, and none outside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root = path.resolve()

    def has(self, name: str) -> bool:
        """Whether there is a file (or a link) of that name, at whatever it may point."""
        return os.path.lexists(self._root / name)

    def names(self, suffix: str) -> list[str]:
        """The names in the folder that end in `suffix`, sorted."""
        return sorted(path.name for path in self._root.iterdir() if path.name.endswith(suffix))

    @contextmanager
    def open(self, name: str) -> Iterator[BinaryIO]:
        """Open a regular file. Raises UnsupportedFile for anything else, such as a link out of the folder."""
        with os.fdopen(self._descriptor(name), "rb") as stream:
            yield stream

    def _descriptor(self, name: str) -> int:
        # Not Path.resolve, which gives up on links in a circle with a RuntimeError.
        path = Path(os.path.realpath(self._root / name))
        if not path.is_relative_to(self._root):
            raise UnsupportedFile(
                f"file {name!r} leads out of its folder and isn't read; copy it with its links followed (cp -rL)", name
            )
        try:
            # A link put there since, or a pipe, must neither be followed nor waited for.
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                raise
            raise UnsupportedFile(f"file {name!r} is missing, or no file; download the folder again", name) from None
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise UnsupportedFile(f"file {name!r} isn't a regular file; download the folder again", name)
        return descriptor

    def json(self, name: str) -> dict[str, Any]:
        """A JSON object. Raises UnsupportedFile, TooLarge or InvalidManifest."""
        with self.open(name) as stream:
            raw = stream.read(MAX_JSON_BYTES + 1)
        if len(raw) > MAX_JSON_BYTES:
            raise TooLarge(f"file {name!r} is larger than {MAX_JSON_BYTES} bytes; is it the right file?", name)
        try:
            content = from_json(raw)
        except ValueError as exc:
            raise InvalidManifest(f"file {name!r} isn't JSON ({exc}); download it again", name) from None
        if not isinstance(content, dict):
            raise InvalidManifest(f"file {name!r} isn't a JSON object; download it again", name)
        return content

    def config(self, name: str, kind: type[T]) -> T:
        """A JSON file with the fields of `kind`. Raises UnsupportedFile, TooLarge or InvalidManifest."""
        return parsed(self.json(name), name, kind)


def parsed(content: dict[str, Any], name: str, kind: type[T]) -> T:
    """The fields of `kind` in the content of the file `name`. Raises InvalidManifest, naming the field."""
    try:
        return kind.model_validate(content)
    except ValidationError as exc:
        error = exc.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in error["loc"])
        raise InvalidManifest(f"{name}: field {field!r}: {error['msg']}; correct the file", f"{name}.{field}") from None


def safetensors_header(stream: BinaryIO, name: str) -> dict[str, TensorEntry]:
    """The tensors of a safetensors stream. Raises InvalidTensor, UnsupportedFile or TooLarge."""
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    total = stream.seek(0, os.SEEK_END)
    if MAX_SAFETENSORS_HEADER < length <= total - 8:
        raise TooLarge(f"file {name!r}: its header has {length} bytes, too many for an import", name)
    return read_header(stream, name)


def read_floats(stream: BinaryIO, name: str, wanted: Collection[str], max_bytes: int) -> dict[str, Float32]:
    """The wanted tensors of a safetensors stream as float32, which together must fit into `max_bytes`.

    Raises InvalidTensor, naming a tensor that is missing, UnsupportedFile or TooLarge.
    """
    entries = safetensors_header(stream, name)
    for tensor in wanted:
        if tensor not in entries:
            raise InvalidTensor(f"file {name!r} has no tensor {tensor!r}; it has {sorted(entries)[:8]}", name)
        if entries[tensor].dtype.startswith("I"):
            raise InvalidTensor(f"file {name!r}: tensor {tensor!r} holds integers; convert it to float32", name)
    check_room(sum(4 * count(entries[tensor].shape) for tensor in wanted), name, max_bytes)
    return {
        key: value.astype("float32", copy=False) for key, value in read_tensors(stream, dict.fromkeys(wanted)).items()
    }


def check_room(needed: int, name: str, max_bytes: int) -> None:
    """Raise TooLarge, before anything is allocated, where the tensors of a file need too much memory."""
    if needed > max_bytes:
        raise TooLarge(
            f"file {name!r}: its tensors take {needed} bytes as float32, and {max_bytes} are allowed; raise the limit",
            name,
        )


def count(shape: tuple[int, ...]) -> int:
    """The number of elements."""
    total = 1
    for size in shape:
        total *= size
    return total
