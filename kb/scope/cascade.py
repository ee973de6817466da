"""The head, and where it is in doubt a cross-encoder that reads the likeliest facts beside the question.

The head is quick, and knows nothing of words: that *Kelebek Kümesi* is the *Butterfly Cluster*. The cross-encoder does,
and is slow. Few questions that are about a fact need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from kb.encoders.base import EncoderIdentity
from kb.scope.base import Text
from kb.scope.cross_encoder import CrossEncoderDecider
from kb.scope.head import HeadDecider

DOUBT: Final = (-4.0, 2.0)
"""Log-odds of the head for the likeliest fact between which it is in doubt."""
READ: Final = 2
"""Facts that are read then, likeliest first."""


class Weights(NamedTuple):
    """Of the head's and of the cross-encoder's log-odds, and what is added to their sum."""

    head: float
    reader: float
    bias: float


@dataclass(frozen=True)
class CascadeDecider:
    """`weights` put the decision at 0."""

    head: HeadDecider
    reader: CrossEncoderDecider
    weights: Weights
    name: str = "cascade"

    @property
    def encoder(self) -> EncoderIdentity:
        return self.head.encoder

    def probabilities(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        odds = self.head.log_odds(question, candidates)
        picked = doubted(odds)
        if len(picked):
            read = self.reader.log_odds(question, [candidates[n] for n in picked])
            together = self.weights.head * odds[picked] + self.weights.reader * read + self.weights.bias
            # What wasn't read was less likely.
            odds = np.minimum(odds, together.min())
            odds[picked] = together
        return np.asarray(1 / (1 + np.exp(-odds)))


def doubted(odds: np.ndarray) -> np.ndarray:
    """Which facts are to be read, by the head's log-odds; none where the head is sure."""
    if not DOUBT[0] < odds.max() < DOUBT[1]:
        return np.array([], np.int64)
    return np.argsort(-odds, kind="stable")[:READ]
