"""What the features of an SAE are called: JSON lines of `{"index": 471, "label": "questions"}`."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Annotated, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, ValidationError

from steering_store.errors import InvalidManifest
from steering_store.manifest import Manifest

MAX_LINE_BYTES = 1 << 14


class Label(BaseModel):
    """One line."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    index: NonNegativeInt
    label: Annotated[str, StringConstraints(min_length=1), Field(max_length=4096)]


def check_labels(manifest: Manifest, stream: BinaryIO) -> None:
    """Read all labels of an SAE. Raises InvalidManifest, naming the line, for one that is malformed, of a feature that
    the SAE doesn't have, or the second of its feature."""
    features = manifest.sites[0].shape[0]
    seen: set[int] = set()
    for number, label in enumerate(_labels(stream), start=1):
        if label.index >= features:
            raise _malformed(number, f"index {label.index} is not below {features}, the number of features")
        if label.index in seen:
            raise _malformed(number, f"index {label.index} had a label before")
        seen.add(label.index)


def read_labels(stream: BinaryIO, indices: Collection[int] | None) -> dict[int, str]:
    """The labels by index: all, or those of `indices` that have one."""
    wanted = None if indices is None else set(indices)
    return {each.index: each.label for each in _labels(stream) if wanted is None or each.index in wanted}


def _labels(stream: BinaryIO) -> Iterator[Label]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise _malformed(number, f"it is longer than {MAX_LINE_BYTES} bytes")
        try:
            yield Label.model_validate_json(line)
        except ValidationError as exc:
            error = exc.errors(include_url=False, include_context=False)[0]
            where = ".".join(str(part) for part in error["loc"])
            raise _malformed(number, f"{where}: {error['msg']}" if where else error["msg"]) from None


def _malformed(number: int, reason: str) -> InvalidManifest:
    return InvalidManifest(
        f'labels: line {number}: {reason}; write each line as {{"index": 471, "label": "questions"}}', "labels"
    )
