"""A real encoder that is small: hashed character trigrams. Texts with words in common are near."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from kb.encoders.base import EncoderIdentity

DIMENSION = 64


class Ngrams:
    """`Encoder`. Counts the texts that it was asked for."""

    def __init__(self, name: str = "ngrams", dimension: int = DIMENSION) -> None:
        self.identity = EncoderIdentity(name, dimension, f"sha256:{name}-{dimension}")
        self.encoded = 0

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        self.encoded += len(texts)
        rows = np.zeros((len(texts), self.identity.dimension), np.float32)
        for row, text in zip(rows, texts, strict=True):
            padded = f"  {text.lower()} "
            for start in range(len(padded) - 2):
                hashed = zlib.crc32(padded[start : start + 3].encode())
                row[hashed % len(row)] += 1 if hashed >> 31 else -1
        rows[:, 0] += 0.01
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    encode_documents = encode_queries
