"""A light pair classifier: logistic regression on what a question and its nearest facts have in common.

It costs a fraction of a millisecond per candidate on one core, where the paper's cross-encoder (section 3.2) runs over
every fact of the knowledge base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kb.encoders.base import EncoderIdentity
from kb.scope.base import Text
from kb.scope.features import NAMES, features
from kb.scope.words import BUCKETS, Rarity


@dataclass(frozen=True)
class HeadDecider:
    """`projection` is float32 [dimension, smaller], `weights` float32 [features]; `bias` puts the decision at 0."""

    encoder: EncoderIdentity
    rarity: Rarity
    projection: np.ndarray
    weights: np.ndarray
    bias: float
    name: str = "head"

    def probabilities(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        rows = features(question, candidates, self.rarity, self.projection)
        return np.asarray(1 / (1 + np.exp(-(rows @ self.weights + self.bias))))

    def tensors(self) -> dict[str, np.ndarray]:
        """All that it has learned."""
        return {
            "rarity": self.rarity.counts,
            "projection": np.ascontiguousarray(self.projection),
            "weights": self.weights,
            "bias": np.array([self.bias], np.float64),
        }

    @classmethod
    def from_tensors(cls, encoder: EncoderIdentity, texts: int, tensors: Mapping[str, np.ndarray]) -> HeadDecider:
        """The inverse of `tensors`. Raises KeyError or ValueError for tensors of something else."""
        rarity, projection, weights, bias = (tensors[name] for name in ("rarity", "projection", "weights", "bias"))
        shapes = (rarity.shape, projection.shape[0], weights.shape, bias.shape)
        if shapes != ((BUCKETS,), encoder.dimension, (len(NAMES),), (1,)):
            raise ValueError(f"tensors of other sizes than this version's: {shapes}")
        return cls(encoder, Rarity(texts, rarity), projection, weights, float(bias[0]))
