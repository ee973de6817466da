"""An encoder that keeps what it has encoded in a folder, so that a benchmark that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from kb.encoders import Encoder


class CachedEncoder:
    """One file for each list of texts, named by its digest and the encoder's."""

    def __init__(self, encoder: Encoder, folder: Path | None) -> None:
        self._encoder = encoder
        self._folder = folder
        self.identity = encoder.identity

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._cached("queries", texts, self._encoder.encode_queries)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        return self._cached("documents", texts, self._encoder.encode_documents)

    def _cached(self, side: str, texts: Sequence[str], encode: Callable[[Sequence[str]], np.ndarray]) -> np.ndarray:
        if self._folder is None:
            return encode(texts)
        content = json.dumps([self.identity.digest, side, list(texts)]).encode()
        file = self._folder / f"{hashlib.sha256(content).hexdigest()}.npy"
        if file.exists():
            return np.asarray(np.load(file, allow_pickle=False))
        rows = encode(texts)
        self._folder.mkdir(parents=True, exist_ok=True)
        np.save(file, rows)
        return rows
