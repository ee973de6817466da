"""From a question to the facts that it is about: nearest vectors first, then the scope decision."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple, Protocol

import numpy as np

from kb.facts import Fact, Hit
from kb.filters import Filter
from kb.scope import Decider, Text

_ATTEMPTS = 3
CANDIDATES = 8
"""Facts that the scope decision looks at. What is further away is nearly never the right one."""


class Searchable(Protocol):
    """A collection, as far as questions go."""

    def search(
        self, vectors: np.ndarray, k: int, *, where: Filter | None = None, at: datetime | None = None
    ) -> list[list[Hit]]: ...

    def vectors(self, facts: Sequence[Fact]) -> list[np.ndarray | None]: ...


class Found(NamedTuple):
    """A fact, its vector, the cosine of that and the question's, and the probability that the question is about it."""

    fact: Fact
    vector: np.ndarray
    similarity: float
    probability: float


def find(collection: Searchable, decider: Decider, question: Text, *, where: Filter | None = None) -> list[Found]:
    """The nearest facts, most probable first; whether one is probable enough is for the caller to say."""
    facts = _nearest(collection, question, where)
    if not facts:
        return []
    candidates = [Text(fact.key, fact.language, vector) for fact, vector in facts]
    found = [
        Found(fact, vector, float(vector @ question.vector), float(probability))
        for (fact, vector), probability in zip(facts, decider.probabilities(question, candidates), strict=True)
    ]
    return sorted(found, key=lambda each: (-each.probability, -each.similarity))


def _nearest(collection: Searchable, question: Text, where: Filter | None) -> list[tuple[Fact, np.ndarray]]:
    """With their vectors. A fact that is changed between the two looks is looked for again, and at last left out."""
    for _ in range(_ATTEMPTS):
        facts = [hit.fact for hit in collection.search(question.vector[None], CANDIDATES, where=where)[0]]
        vectors = collection.vectors(facts) if facts else []
        known = [(fact, vector) for fact, vector in zip(facts, vectors, strict=True) if vector is not None]
        if len(known) == len(facts):
            break
    return known
