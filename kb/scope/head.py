"""A light pair classifier: a small network on what a question and its nearest facts have in common.

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
from kb.scope.network import Network
from kb.scope.space import Space
from kb.scope.words import BUCKETS, Rarity


@dataclass(frozen=True)
class HeadDecider:
    """`bias` puts the decision at 0."""

    encoder: EncoderIdentity
    rarity: Rarity
    space: Space
    network: Network
    bias: float
    name: str = "head"

    def probabilities(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-self.log_odds(question, candidates))))

    def log_odds(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        rows = features(question, candidates, self.rarity, self.space)
        return np.asarray(self.network(rows) + self.bias)

    def tensors(self) -> dict[str, np.ndarray]:
        """What it has learned, but for the names of the languages and the number of texts."""
        learned = {
            "rarity": self.rarity.counts,
            "centres": self.space.centres,
            "projection": self.space.projection,
            **self.network._asdict(),
            "bias": np.array([self.bias], np.float64),
        }
        return {name: np.ascontiguousarray(tensor) for name, tensor in learned.items()}

    @classmethod
    def from_tensors(
        cls, encoder: EncoderIdentity, texts: int, languages: Sequence[str], tensors: Mapping[str, np.ndarray]
    ) -> HeadDecider:
        """The inverse of `tensors`. Raises KeyError or ValueError for tensors of something else."""
        rarity, centres, projection, bias = (tensors[name] for name in ("rarity", "centres", "projection", "bias"))
        network = Network(*(tensors[name] for name in Network._fields))
        shapes = (rarity.shape, centres.shape, projection.shape[0], bias.shape)
        if shapes != ((BUCKETS,), (1 + len(languages), encoder.dimension), encoder.dimension, (1,)):
            raise ValueError(f"tensors of other sizes than this version's: {shapes}")
        if not network.fits(len(NAMES)):
            raise ValueError(f"a network for other features than this version's {len(NAMES)}")
        space = Space(tuple(languages), centres, projection)
        return cls(encoder, Rarity(texts, rarity), space, network, float(bias[0]))
