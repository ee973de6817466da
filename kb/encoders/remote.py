"""Encoders behind HTTP: text-embeddings-inference's own protocol, and OpenAI's, which many servers speak."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Final

import httpx
import numpy as np

from kb.encoders.base import EncoderIdentity, EncoderUnavailable, check_texts, digest_of, unit_rows

TIMEOUT_SECONDS: Final = 30.0
ATTEMPTS: Final = 3
MAX_WAIT_SECONDS: Final = 5.0
TRY_AGAIN: Final = {429, 502, 503, 504}


class _Remote(ABC):
    """POSTs texts in batches. The digest holds all that the server says of itself."""

    kind = ""

    def __init__(self, url: str, api_key: str | None, batch: int) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_SECONDS)
        self._url = url
        self._batch = batch

    @abstractmethod
    def _vectors(self, texts: list[str]) -> Any:
        """What the server answers to some texts: a list of lists of numbers, if it keeps to its protocol."""

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(texts)

    def encode_documents(self, texts: Sequence[str]) -> np.ndarray:
        return self._encode(texts)

    @cached_property
    def dimension(self) -> int:
        return int(self._batch_of(["dimension"]).shape[1])

    def _encode(self, texts: Sequence[str]) -> np.ndarray:
        checked = check_texts(texts)
        rows = np.empty((len(checked), self.dimension), np.float32)
        for start in range(0, len(checked), self._batch):
            part = checked[start : start + self._batch]
            vectors = self._batch_of(part)
            if vectors.shape[1] != self.dimension:
                raise self._unusable(f"vectors of {vectors.shape[1]} numbers, and before of {self.dimension}")
            rows[start : start + len(part)] = vectors
        return unit_rows(rows)

    def _batch_of(self, texts: list[str]) -> np.ndarray:
        try:
            vectors = np.asarray(self._vectors(texts), np.float32)
        except (KeyError, TypeError, ValueError) as error:
            raise self._unusable(f"something else than vectors ({error})") from error
        if vectors.ndim != 2 or len(vectors) != len(texts) or not np.isfinite(vectors).all():
            raise self._unusable(f"an array of shape {vectors.shape} for {len(texts)} texts, or numbers not finite")
        return vectors

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of the answer. A busy server is asked again. Raises EncoderUnavailable."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = self._client.request(method, path, json=body)
            except httpx.TransportError as error:
                failure, wait = f"{type(error).__name__}: {error}", 0.1 * attempt
            else:
                if answer.is_success:
                    return self._json(answer)
                failure, wait = f"{answer.status_code} {answer.text[:200]}", _retry_after(answer)
                if answer.status_code not in TRY_AGAIN:
                    break
            if attempt < ATTEMPTS:
                time.sleep(min(wait, MAX_WAIT_SECONDS))
        raise EncoderUnavailable(f"the encoder at {self._url} doesn't answer {method} {path}: {failure}")

    def _json(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise self._unusable(f"something else than JSON ({error})") from error

    def _unusable(self, what: str) -> EncoderUnavailable:
        return EncoderUnavailable(f"the encoder at {self._url} answered {what}")


class TeiEncoder(_Remote):
    """`POST /embed` of text-embeddings-inference; a server's `--default-prompt` is its own affair."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        super().__init__(url, api_key, batch=32)
        self._info = self._call("GET", "/info")
        self._batch = int(self._info.get("max_client_batch_size", self._batch))

    @cached_property
    def identity(self) -> EncoderIdentity:
        keys = ("model_id", "model_sha", "model_dtype", "model_type", "max_input_length")
        settings = {key: self._info.get(key) for key in keys}
        return EncoderIdentity(f"tei:{settings['model_id']}", self.dimension, digest_of(settings))

    def _vectors(self, texts: list[str]) -> Any:
        return self._call("POST", "/embed", {"inputs": texts, "normalize": True, "truncate": True})


class OpenAIEncoder(_Remote):
    """`POST /embeddings`. The protocol has no digest of the weights, so that the model's name has to stand for them."""

    def __init__(self, url: str, model: str, api_key: str | None = None) -> None:
        super().__init__(url, api_key, batch=128)
        self._model = model

    @cached_property
    def identity(self) -> EncoderIdentity:
        settings = {"protocol": "openai", "model": self._model, "dimension": self.dimension}
        return EncoderIdentity(f"openai:{self._model}", self.dimension, digest_of(settings))

    def _vectors(self, texts: list[str]) -> Any:
        body = {"model": self._model, "input": texts, "encoding_format": "float"}
        answer = self._call("POST", "/embeddings", body)
        return [item["embedding"] for item in sorted(answer["data"], key=lambda item: item["index"])]


def _retry_after(answer: httpx.Response) -> float:
    try:
        return float(answer.headers.get("Retry-After", 0.2))
    except ValueError:  # a date
        return MAX_WAIT_SECONDS
