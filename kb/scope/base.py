"""The scope decision: is this question about that fact? Nearest isn't enough, as something always is nearest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from kb.encoders.base import EncoderIdentity


class ScopeError(Exception):
    """A decider that can't be loaded, or isn't for these vectors."""


class Text(NamedTuple):
    """A question, or what a fact is found by. `vector` is its embedding, a float32 row of length 1."""

    text: str
    language: str | None
    vector: np.ndarray


class Decider(Protocol):
    """Judges pairs, from any thread. `name` goes into receipts; `encoder` made the vectors that it was fitted on."""

    @property
    def name(self) -> str: ...

    @property
    def encoder(self) -> EncoderIdentity | None:
        """None where it reads no vectors."""
        ...

    def probabilities(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        """float [candidates]: that the question asks for what each one says; from 0.5 on, it is taken to.

        The candidates are all near the question, nearest first, so that they are each other's near misses.
        """
        ...
