"""A light pair classifier: a small network on what a question and its nearest facts have in common.

It costs well below a millisecond per candidate on one core, where the paper's cross-encoder (section 3.2) runs over
every fact of the knowledge base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kb.encoders.base import EncoderIdentity
from kb.scope.base import Text
from kb.scope.features import NAMES, features
from kb.scope.words import BUCKETS, Rarity


class Layer(NamedTuple):
    weights: np.ndarray
    """[inputs, outputs]."""
    biases: np.ndarray


@dataclass(frozen=True)
class HeadDecider:
    """`projection` is float32 [dimension, smaller]; `mean` and `scale` [features] standardise the features."""

    encoder: EncoderIdentity
    rarity: Rarity
    projection: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    layers: tuple[Layer, ...]
    name: str = "head"

    def probabilities(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        rows = features(question, candidates, self.rarity, self.projection)
        return np.asarray(1 / (1 + np.exp(-self.logits(rows))))

    def logits(self, rows: np.ndarray) -> np.ndarray:
        """[pairs] from features [pairs, len(NAMES)]."""
        states = (rows - self.mean) / self.scale
        for layer in self.layers[:-1]:
            states = np.maximum(states @ layer.weights + layer.biases, 0)
        return np.asarray(states @ self.layers[-1].weights + self.layers[-1].biases)[:, 0]

    def tensors(self) -> dict[str, np.ndarray]:
        """All that it has learned."""
        found = {"rarity": self.rarity.counts, "projection": self.projection, "mean": self.mean, "scale": self.scale}
        for number, layer in enumerate(self.layers):
            found |= {f"weights.{number}": layer.weights, f"biases.{number}": layer.biases}
        return {name: np.ascontiguousarray(tensor) for name, tensor in found.items()}

    @classmethod
    def from_tensors(cls, encoder: EncoderIdentity, texts: int, tensors: Mapping[str, np.ndarray]) -> HeadDecider:
        """The inverse of `tensors`. Raises KeyError or ValueError for tensors of something else."""
        count = sum(name.startswith("weights.") for name in tensors)
        layers = tuple(Layer(tensors[f"weights.{n}"], tensors[f"biases.{n}"]) for n in range(count))
        widths = [len(NAMES), *(layer.weights.shape[1] for layer in layers)]
        if [layer.weights.shape for layer in layers] != list(zip(widths[:-1], widths[1:], strict=True)) or not count:
            raise ValueError(f"layers of shapes {[layer.weights.shape for layer in layers]}")
        if tensors["rarity"].shape != (BUCKETS,) or tensors["projection"].shape[0] != encoder.dimension:
            raise ValueError("counts or a projection of another size")
        rarity = Rarity(texts, tensors["rarity"])
        return cls(encoder, rarity, tensors["projection"], tensors["mean"], tensors["scale"], layers)
