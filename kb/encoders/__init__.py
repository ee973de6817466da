"""Encoders, by name: the embedded one, any of sentence-transformers, and remote ones."""

from __future__ import annotations

from kb.encoders.base import (
    Encoder,
    EncoderError,
    EncoderIdentity,
    EncoderUnavailable,
    InvalidText,
    UnknownEncoder,
)
from kb.encoders.e5 import VARIANTS, EmbeddedE5

__all__ = [
    "DEFAULT",
    "Encoder",
    "EncoderError",
    "EncoderIdentity",
    "EncoderUnavailable",
    "InvalidText",
    "UnknownEncoder",
    "load",
]

DEFAULT = "e5-small"


def load(spec: str, *, api_key: str | None = None) -> Encoder:
    """The encoder that `spec` names. `api_key` is for remote ones.

    - `e5-small`: multilingual-e5-small, embedded, for texts of one sort, as questions are; `e5-small-passages` for
      questions about longer texts.
    - `st:FOLDER_OR_HUB_ID`: any model of sentence-transformers.
    - `tei:URL`: a server that speaks the protocol of text-embeddings-inference.
    - `openai:URL#MODEL`: one that has OpenAI's `/embeddings` below the URL (`https://host/v1`).

    Raises UnknownEncoder for anything else, EncoderUnavailable where a remote one doesn't answer.
    """
    if spec in VARIANTS:
        return EmbeddedE5(spec)
    kind, _, rest = spec.partition(":")
    if kind == "st" and rest:
        # Imported only here: it takes seconds, and is an extra.
        from kb.encoders.sentence_transformer import SentenceTransformerEncoder

        return SentenceTransformerEncoder(rest)
    if kind in ("tei", "openai") and rest.startswith(("http://", "https://")):
        from kb.encoders.remote import OpenAIEncoder, TeiEncoder

        if kind == "tei":
            return TeiEncoder(rest, api_key)
        url, _, model = rest.partition("#")
        if model:
            return OpenAIEncoder(url, model, api_key)
    known = ", ".join([*VARIANTS, "st:FOLDER_OR_HUB_ID", "tei:URL", "openai:URL#MODEL"])
    raise UnknownEncoder(f"no encoder is called {spec!r}: use one of {known}")
