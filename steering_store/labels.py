"""What the features of an SAE are called and where they fire, as JSON lines:
`{"index": 471, "label": "questions", "examples": [{"text": "Where is it? I ask.", "token": "?", "activation": 8.1}]}`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Annotated, BinaryIO, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, StringConstraints, ValidationError, model_validator

from steering_store.errors import InvalidManifest
from steering_store.manifest import Manifest

MAX_LINE_BYTES = 1 << 16
MAX_EXAMPLES = 32


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Example(_Part):
    """Where a feature fires: at `token`, with so much `activation`; `text` is what stands around it."""

    text: Annotated[str, Field(max_length=1024)]
    token: Annotated[str, Field(max_length=256)]
    activation: float


class Label(_Part):
    """One line: a feature's label, or the texts on which it fires most, or both."""

    index: NonNegativeInt
    label: Annotated[str, StringConstraints(min_length=1), Field(max_length=4096)] | None = None
    examples: Annotated[list[Example], Field(max_length=MAX_EXAMPLES)] = []

    @model_validator(mode="after")
    def _says_something(self) -> Label:
        if self.label is None and not self.examples:
            raise ValueError("needs a label, or examples")
        return self

    def matches(self, words: Collection[str]) -> bool:
        """Whether each of the words, in lower case, is somewhere in the label; no words match any feature."""
        label = (self.label or "").casefold()
        return all(word in label for word in words)


class FeaturePage(NamedTuple):
    """Some features by rising index, and whether there are more behind them."""

    items: list[Label]
    has_more: bool


def check_labels(manifest: Manifest, stream: BinaryIO) -> None:
    """Read all labels of an SAE. Raises InvalidManifest, naming the line, for one that is malformed, of a feature that
    the SAE doesn't have, or the second of its feature."""
    features = next(site.shape[0] for site in manifest.sites if site.role == "encoder")
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
    return {
        each.index: each.label
        for each in _labels(stream)
        if each.label is not None and (wanted is None or each.index in wanted)
    }


def read_features(stream: BinaryIO) -> list[Label]:
    """All lines, by rising index."""
    return sorted(_labels(stream), key=lambda each: each.index)


def find_features(features: Iterable[Label], query: str, after: int | None, limit: int) -> FeaturePage:
    """The first features behind the index `after` whose label has every word of the query, in any case and order."""
    words = query.casefold().split()
    least = -1 if after is None else after
    found = [each for each in features if each.index > least and each.matches(words)]
    return FeaturePage(found[:limit], has_more=len(found) > limit)


def write_features(features: Collection[Label]) -> bytes:
    """The lines of a labels file."""
    lines = (each.model_dump_json(exclude_none=True, exclude_defaults=True) for each in features)
    return "".join(f"{line}\n" for line in lines).encode()


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
