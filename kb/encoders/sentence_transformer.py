"""Any model of sentence-transformers, from a folder or a hub. Its own prompts for queries and documents are used."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Final

import numpy as np

from kb.encoders.base import EncoderIdentity, UnknownEncoder, check_texts, digest_of, unit_rows
from kb.locks import Turns

BATCH: Final = 32
"""Texts of one turn: a query waits for no more documents than these."""


class SentenceTransformerEncoder:
    """Raises UnknownEncoder where the model can't be loaded; it says why."""

    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise UnknownEncoder(f"st:{model} needs sentence-transformers: install polyhelm[encoders]") from error
        try:
            self._model: Any = SentenceTransformer(model)
        except (OSError, ValueError) as error:
            raise UnknownEncoder(f"st:{model} can't be loaded: {error}") from error
        self._name = f"st:{model.rstrip('/').rpartition('/')[2]}"
        # transformers' fast tokenizers refuse to be used by two threads.
        self._turns = Turns()

    @cached_property
    def identity(self) -> EncoderIdentity:
        model = self._model
        dimension = model.get_embedding_dimension()
        settings = {"prompts": model.prompts, "max_length": model.max_seq_length, "modules": str(model)}
        return EncoderIdentity(self._name, dimension, digest_of(settings, _state_hash(model)))

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(self._model.encode_query, texts, first=True)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(self._model.encode_document, texts, first=False)

    def _encode(self, encode: Callable[..., np.ndarray], texts: Sequence[str], *, first: bool) -> np.ndarray:
        checked = check_texts(texts)
        rows = np.empty((len(checked), self.identity.dimension), np.float32)
        for start in range(0, len(checked), BATCH):
            part = checked[start : start + BATCH]
            with self._turns.taken(first=first):
                rows[start : start + len(part)] = encode(part, convert_to_numpy=True, show_progress_bar=False)
        return unit_rows(rows)


def _state_hash(model: Any) -> str:
    """Of the weights, wherever they came from, and of the tokenizer."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update(repr(sorted(model.tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()
