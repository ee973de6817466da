"""Contrastive activation addition: a steering vector from pairs of texts that differ in one property.

For pair i with activations p_i and n_i [hidden] at a layer, the vector of that layer is

    mean_difference:  v = mean_i (p_i - n_i)
    pca:              v = (u . mean_i (p_i - n_i)) u, with u the first right singular vector of the matrix of the
                      differences [pairs, hidden]; sign and length are taken from the mean difference, so that a
                      strength means the same in both variants

and steering adds `strength * v` (`add`), or `strength * ||x|| * v / ||v||` (`add_norm`), to the residual stream x after
the layer. The first is Rimsky et al. 2024, "Steering Llama 2 via contrastive activation addition", eq. 1; the second
follows Zou et al. 2023, "Representation engineering", section 3.1.

The paper adds at every token after the prompt, at one layer; the default here is every token, at the middle third of
the layers (`default_layers` says otherwise). The strength is the paper's multiplier: 1.0 is one average contrast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from methods import extractors

Array = npt.NDArray[np.float32]
Variant = Literal["mean_difference", "pca"]
Pooling = Literal["last", "mean"]


@dataclass(frozen=True, slots=True)
class Config:
    """`pooling` says where in a text the activation is read: at its last token, or averaged over its tokens."""

    variant: Variant = "mean_difference"
    pooling: Pooling = "last"
    default_layers: tuple[int, ...] | None = None
    default_strength: float = 1.0


@dataclass(frozen=True, slots=True)
class Fit:
    """`vectors` [layers, hidden]; `agreement` [layers]: the share of held-out pairs whose difference points along the
    vector fitted on the other half of the pairs (0.5 is chance)."""

    vectors: Array
    agreement: Array
    default_layers: tuple[int, ...]


def fit(positive: Array, negative: Array, config: Config) -> Fit:
    """Fit from activations [pairs, layers, hidden], both float32. ValueError for fewer than 2 pairs or unequal
    shapes.
    """
    if positive.shape != negative.shape or positive.ndim != 3:
        raise ValueError(f"need equal shapes [pairs, layers, hidden], got {positive.shape} and {negative.shape}")
    pairs, layers, _ = positive.shape
    if pairs < 2:
        raise ValueError(f"need at least 2 pairs, got {pairs}")
    differences = positive - negative
    default_layers = config.default_layers or middle_third(layers)
    if bad := [layer for layer in default_layers if not 0 <= layer < layers]:
        raise ValueError(f"default_layers {bad} are outside the model's {layers} layers")
    return Fit(_vectors(differences, config.variant), _agreement(differences, config.variant), default_layers)


def middle_third(layers: int) -> tuple[int, ...]:
    return tuple(range(layers // 3, max(2 * layers // 3, layers // 3 + 1)))


def _vectors(differences: Array, variant: Variant) -> Array:
    mean: Array = differences.mean(axis=0)
    if variant == "mean_difference":
        return mean
    first = np.stack([extractors.principal(differences[:, layer]) for layer in range(len(mean))])
    scaled: Array = (first * mean).sum(axis=1, keepdims=True) * first
    return scaled


def _agreement(differences: Array, variant: Variant) -> Array:
    halves = differences[0::2], differences[1::2]
    agree = [
        np.einsum("plh,lh->pl", held_out, _vectors(other, variant)) > 0 for held_out, other in (halves, halves[::-1])
    ]
    share: Array = np.concatenate(agree).mean(axis=0, dtype=np.float32)
    return share
