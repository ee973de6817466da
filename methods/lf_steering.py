"""LF-Steering (Yang et al. 2025): amplify the features that tell consistent answers from inconsistent ones.

Offline, from the activations of prompts at their last token:

1. Layer: for pairs of paraphrases (m, n), answered alike or not, a linear classifier on [h(m); h(n)] per layer, trained
   on four fifths; the layer where it is most accurate on the last fifth (`locate`).
2. Features: for pairs of a prompt u that is answered right and a rephrasing v that isn't, with a = the SAE's code,
   g_i = mean |a_i(u) - a_i(v)|, and the features I = {i: g_i > threshold} (`select`).

Online, for an activation x with a = encode(x), at that layer:

    literal, the paper's:  a_i <- a_i + alpha g_i for i in I where a_i != 0;  x <- decode(a)
    delta, the default:    x <- x + alpha sum_{i in I, a_i != 0} g_i d_i

Both change the same features alike; the literal form also replaces x by its reconstruction, so that the SAE's error
enters the model. The paper's threshold is 0.10 and its alpha 20, in units of its own SAE's activations (k 192 of
65,536, Llama-2-7B, one layer): another SAE needs another alpha.

Either form is one `rank` edit over an SAE of its own (`delta_rows`, `literal_rows`): x += s sum_k jumprelu(z_k) d_k. "1
where z > t" is two rows, since jumprelu(z + 1, t + 1) - jumprelu(z, t) is z + 1 - z above the threshold t and 0 below
it. With a topk SAE the true test "a_i != 0" needs all features; `methods/sae.py: calibrated` gives it a threshold.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from methods import extractors
from methods.sae import Sae

Array = npt.NDArray[np.float32]
BELOW_ALL = np.finfo(np.float32).min
"""A threshold that everything is above."""


@dataclass(frozen=True, slots=True)
class Located:
    """`accuracies` [layers] of the classifier on held-out pairs; `majority`: that of always saying the same.
    `layer`: the best.
    """

    accuracies: Array
    majority: float
    layer: int


def locate(
    first: Array, second: Array, consistent: npt.NDArray[np.bool_], penalty: float = 0.01, seed: int = 0
) -> Located:
    """The layer whose activations tell best whether two paraphrases are answered alike.

    `first` and `second` [pairs, layers, hidden], `consistent` [pairs]. Held out is a fifth of each class, drawn with
    the seed. ValueError for shapes that differ, or fewer than 10 pairs of a class.
    """
    if first.shape != second.shape or first.ndim != 3 or consistent.shape != first.shape[:1]:
        raise ValueError(
            f"need [pairs, layers, hidden] twice and [pairs], got {first.shape}, {second.shape} and {consistent.shape}"
        )
    classes = int(consistent.sum()), int((~consistent).sum())
    if min(classes) < 10:
        raise ValueError(f"need at least 10 consistent and 10 inconsistent pairs, got {classes[0]} and {classes[1]}")
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(np.flatnonzero(side)) for side in (consistent, ~consistent)])
    labels, held_out = consistent[order], extractors.held_out_fifth(*classes)
    accuracies = np.empty(first.shape[1], np.float32)
    for layer in range(first.shape[1]):
        both = np.concatenate([first[order, layer], second[order, layer]], axis=1)
        train, known = both[~held_out], labels[~held_out]
        weights, intercept = extractors.logistic(train[known], train[~known], penalty)
        accuracies[layer] = ((both[held_out] @ weights + intercept > 0) == labels[held_out]).mean()
    share = float(labels[held_out].mean())
    return Located(accuracies, max(share, 1 - share), int(accuracies.argmax()))


@dataclass(frozen=True, slots=True)
class Features:
    """The key features: `indices` into the SAE, by falling gain, and their `gains` g_i, in the SAE's units."""

    indices: npt.NDArray[np.int64]
    gains: Array


def select(sae: Sae, right: Array, wrong: Array, threshold: float = 0.10, most: int | None = None) -> Features:
    """Features whose mean change between the two sides of the pairs [pairs, width] is above the threshold, at most so
    many. ValueError for shapes that differ; none is a result, too.
    """
    if right.shape != wrong.shape or right.ndim != 2 or not len(right):
        raise ValueError(f"need equal shapes [pairs, width], got {right.shape} and {wrong.shape}")
    gains: Array = np.abs(sae.encode(right) - sae.encode(wrong)).mean(axis=0)
    order = np.argsort(-gains, kind="stable")[:most]
    indices = order[gains[order] > threshold]
    return Features(indices, gains[indices])


def literal(sae: Sae, x: Array, features: Features, alpha: float) -> Array:
    """Decode-and-replace, for x [tokens, width]."""
    a = sae.encode(x)
    chosen = a[:, features.indices]
    a[:, features.indices] = chosen + np.float32(alpha) * features.gains * (chosen != 0)
    return sae.decode(a)


def delta(sae: Sae, x: Array, features: Features, alpha: float) -> Array:
    """The form without the SAE's error, for x [tokens, width]."""
    active = sae.encode(x)[:, features.indices] != 0
    steps = (np.float32(alpha) * features.gains * active).astype(np.float32)
    moved: Array = x + steps @ sae.decoder[features.indices]
    return moved


def delta_rows(sae: Sae, features: Features) -> Sae:
    """A jumprelu SAE with two features for each key feature, such that x += alpha decode(encode(x)) is `delta`.

    ValueError for a topk SAE (calibrate it) and for no features.
    """
    threshold = _threshold(sae)
    if not len(features.indices):
        raise ValueError("no feature is above the threshold; lower it, or give more telling pairs")
    chosen = features.indices
    encoder, bias, cut = sae.encoder[chosen], sae.encoder_bias[chosen], threshold[chosen]
    step = features.gains[:, None] * sae.decoder[chosen]
    return Sae(
        "jumprelu",
        np.concatenate([encoder, encoder]),
        np.concatenate([bias + 1, bias]),
        np.concatenate([step, -step]),
        np.zeros(encoder.shape[1], np.float32),
        threshold=np.concatenate([cut + 1, cut]),
    )


def literal_rows(sae: Sae, features: Features, alpha: float) -> Sae:
    """A jumprelu SAE such that x += decode(encode(x)) is `literal`: the SAE itself, its bias as a feature that always
    fires, one feature for each coordinate to take x away, and the rows of `delta_rows`.

    ValueError for a topk SAE: calibrate it. Alpha is part of it, and its strength is 1.
    """
    threshold, width = _threshold(sae), sae.encoder.shape[1]
    eye, zero = np.eye(width, dtype=np.float32), np.zeros(width, np.float32)
    parts = [
        Sae("jumprelu", sae.encoder, sae.encoder_bias, sae.decoder, zero, threshold=threshold),
        Sae("jumprelu", zero[None], np.ones(1, np.float32), sae.decoder_bias[None], zero, threshold=zero[:1]),
        Sae("jumprelu", eye, zero, -eye, zero, threshold=np.full(width, BELOW_ALL, np.float32)),
    ]
    if len(features.indices):
        parts.append(delta_rows(sae, Features(features.indices, np.float32(alpha) * features.gains)))
    return Sae(
        "jumprelu",
        np.concatenate([part.encoder for part in parts]),
        np.concatenate([part.encoder_bias for part in parts]),
        np.concatenate([part.decoder for part in parts]),
        zero,
        threshold=np.concatenate([_threshold(part) for part in parts]),
    )


def _threshold(sae: Sae) -> Array:
    if sae.activation == "topk":
        raise ValueError("whether a topk feature fires depends on all others; calibrate the SAE first")
    return np.zeros(len(sae.encoder), np.float32) if sae.threshold is None else sae.threshold
