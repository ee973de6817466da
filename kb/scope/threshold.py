"""A threshold on the cosine for each pair of languages: E5's crowd into 0.7 to 1, and lie lower across scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kb.encoders.base import EncoderIdentity
from kb.scope.base import ScopeError, Text

SLOPE = 50.0
"""A cosine 0.02 above the threshold has probability 0.73."""
MIN_POSITIVES = 20
"""Fewer judged pairs of two languages than this, and the threshold of all pairs is theirs."""


class Judged(NamedTuple):
    """A pair with the truth: is the question about the fact?"""

    question_language: str | None
    fact_language: str | None
    cosine: float
    match: bool


@dataclass(frozen=True)
class ThresholdDecider:
    """`thresholds` by `question language>fact language`; for all others `same_language`, where near misses lie highest,
    or `fallback`.
    """

    fallback: float
    thresholds: Mapping[str, float] = field(default_factory=dict)
    encoder: EncoderIdentity | None = None
    same_language: float | None = None
    name: str = "threshold"

    def probabilities(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        cosines = np.array([float(each.vector @ question.vector) for each in candidates])
        limits = np.array([self._limit(question.language, each.language) for each in candidates])
        return np.asarray(1 / (1 + np.exp(-SLOPE * (cosines - limits))))

    def _limit(self, question: str | None, fact: str | None) -> float:
        alike = self.same_language if question is not None and question == fact else None
        return self.thresholds.get(f"{question}>{fact}", self.fallback if alike is None else alike)

    def settings(self) -> dict[str, Any]:
        return {
            "fallback": self.fallback,
            "same_language": self.same_language,
            "thresholds": dict(self.thresholds),
        }


def calibrate(
    pairs: Iterable[Judged], encoder: EncoderIdentity | None, *, false_fires: float = 0.02
) -> ThresholdDecider:
    """Per pair of languages the lowest threshold with at most this share of the non-matches above it.

    ScopeError where there are no non-matches.
    """
    judged = list(pairs)
    groups: dict[str, list[Judged]] = {}
    for each in judged:
        groups.setdefault(f"{each.question_language}>{each.fact_language}", []).append(each)
    enough = {
        name: group
        for name, group in groups.items()
        if min(sum(each.match for each in group), sum(not each.match for each in group)) >= MIN_POSITIVES
    }
    thresholds = {name: _threshold(group, false_fires) for name, group in sorted(enough.items())}
    alike = [each for each in judged if each.question_language == each.fact_language is not None]
    same = _threshold(alike, false_fires) if sum(not each.match for each in alike) >= MIN_POSITIVES else None
    return ThresholdDecider(_threshold(judged, false_fires), thresholds, encoder, same)


def _threshold(judged: Sequence[Judged], false_fires: float) -> float:
    misses = np.sort([each.cosine for each in judged if not each.match])
    if not len(misses):
        raise ScopeError("a threshold needs pairs that don't match: give questions about other facts")
    above = int(false_fires * len(misses))
    return float(np.nextafter(misses[len(misses) - 1 - above], 2))
