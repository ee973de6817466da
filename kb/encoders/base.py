"""What turns texts into vectors.

EncoderError
├── InvalidText             a text that no encoder takes
├── UnknownEncoder          nothing can be loaded by that name
└── EncoderUnavailable      a remote encoder that doesn't answer, or not as its protocol says
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class EncoderError(Exception):
    """An encoder can't do what it is asked for."""


class InvalidText(EncoderError):
    """A text that isn't a string of Unicode characters."""


class UnknownEncoder(EncoderError):
    """A specification by which no encoder can be loaded."""


class EncoderUnavailable(EncoderError):
    """A remote encoder that refuses, doesn't answer, or answers something else than vectors."""


class EncoderIdentity(NamedTuple):
    """Vectors are comparable only within one identity. `digest` is of the weights and of the settings."""

    name: str
    dimension: int
    digest: str


class Encoder(Protocol):
    """Turns texts into unit vectors, from any thread. Raises EncoderError."""

    @property
    def identity(self) -> EncoderIdentity: ...

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension], rows of length 1."""
        ...

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension], rows of length 1; a document matches a query where the dot product is large."""
        ...


def check_texts(texts: Sequence[str]) -> list[str]:
    """The texts as a list. InvalidText for what isn't Unicode, such as half of a surrogate pair."""
    if isinstance(texts, str):
        raise InvalidText("texts must be a sequence of strings, and this is one string: put it into a list")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InvalidText(f"text {index} is a {type(text).__name__}: give a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidText(f"text {index} holds half of a surrogate pair at {error.start}: remove it") from None
    return list(texts)


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """float32 [n, dimension] with rows of length 1; a row of zeros stays."""
    rows = np.asarray(rows, np.float32)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12))


def digest_of(settings: Mapping[str, Any], *hashes: str) -> str:
    """`sha256:…` over settings and hashes of files."""
    text = json.dumps([settings, hashes], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
