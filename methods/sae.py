"""A sparse auto-encoder in numpy, and how well it explains activations.

For x [width], with e_k and d_k the rows of encoder and decoder:

    z_k = e_k . x + b_k;  a = f(z);  decode(a) = sum_k a_k d_k + decoder_bias

f is `relu`; `jumprelu`, z_k where z_k > threshold_k, else 0 (Rajamanoharan et al. 2024); or `topk`, relu of the k
largest z of a token (Gao et al. 2024). Where an SAE is defined on x - decoder_bias, -e_k . decoder_bias is part of b_k.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Activation = Literal["relu", "jumprelu", "topk"]
CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Sae:
    """`encoder` and `decoder` [features, width], `encoder_bias` [features], `decoder_bias` [width]; `threshold`
    [features] with jumprelu, `k` with topk.
    """

    activation: Activation
    encoder: Array
    encoder_bias: Array
    decoder: Array
    decoder_bias: Array
    threshold: Array | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        features, width = self.encoder.shape
        shapes = [self.decoder.shape, self.encoder_bias.shape, self.decoder_bias.shape]
        if shapes != [(features, width), (features,), (width,)]:
            raise ValueError(
                f"decoder, encoder_bias and decoder_bias {shapes} don't fit the encoder {(features, width)}"
            )
        if (self.threshold is not None) != (self.activation == "jumprelu"):
            raise ValueError("jumprelu needs a threshold, and nothing else has one")
        if self.threshold is not None and self.threshold.shape != (features,):
            raise ValueError(f"threshold {self.threshold.shape} must be {(features,)}")
        if (self.k is not None) != (self.activation == "topk"):
            raise ValueError("topk needs k, and nothing else has it")
        if self.k is not None and not 0 < self.k <= features:
            raise ValueError(f"k {self.k} must be between 1 and the {features} features")

    def pre(self, x: Array) -> Array:
        """z [tokens, features] of x [tokens, width]."""
        z: Array = x @ self.encoder.T + self.encoder_bias
        return z

    def encode(self, x: Array) -> Array:
        """a [tokens, features] of x [tokens, width]."""
        z = self.pre(x)
        if self.threshold is not None:
            return np.where(z > self.threshold, z, np.float32(0))
        a = np.maximum(z, np.float32(0))
        if self.k is not None and self.k < z.shape[1]:
            smaller = np.argpartition(z, -self.k, axis=1)[:, : -self.k]
            np.put_along_axis(a, smaller, np.float32(0), axis=1)
        return a

    def decode(self, a: Array) -> Array:
        """[tokens, width] of a [tokens, features]."""
        x: Array = a @ self.decoder + self.decoder_bias
        return x


@dataclass(frozen=True, slots=True)
class Quality:
    """`fvu`: the squared error as a share of the rows' variance, 0 for perfect and 1 for their mean. `l0`: features
    that fire on a token, on average. `dead`: the share of features that fire on none of the rows.
    """

    fvu: float
    l0: float
    dead: float


def quality(sae: Sae, rows: Array) -> Quality:
    """Over rows [tokens, width]. ValueError for fewer than 2."""
    if len(rows) < 2:
        raise ValueError(f"need at least 2 rows, got {len(rows)}")
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    error = variance = 0.0
    fired = np.zeros(len(sae.encoder), np.int64)
    for start in range(0, len(rows), CHUNK):
        x = np.asarray(rows[start : start + CHUNK], np.float32)
        a = sae.encode(x)
        error += float(((x - sae.decode(a)) ** 2).sum(dtype=np.float64))
        variance += float(((x - mean) ** 2).sum(dtype=np.float64))
        fired += np.count_nonzero(a, axis=0)
    return Quality(error / variance, float(fired.sum() / len(rows)), float((fired == 0).mean()))


def ordinary(rows: Array, factor: float = 10.0) -> npt.NDArray[np.bool_]:
    """Which rows [tokens, width] are at most `factor` times as long as the median one.

    Attention sinks can be a hundred times longer (Sun et al. 2024, "Massive activations"), also behind the first token.
    A handful of them are most of the variance: an FVU with them says nothing about the others, and training wastes
    features.
    """
    return within(lengths(rows), factor)


def within(norms: Array, factor: float = 10.0) -> npt.NDArray[np.bool_]:
    """`ordinary`, of the rows' lengths."""
    kept: npt.NDArray[np.bool_] = norms <= factor * np.median(norms)
    return kept


def lengths(rows: Array) -> Array:
    """[tokens] of rows [tokens, width], which may be mapped from a file: a chunk at a time is read."""
    parts = [
        np.linalg.norm(rows[start : start + CHUNK].astype(np.float32), axis=1) for start in range(0, len(rows), CHUNK)
    ]
    return np.concatenate([*parts, np.empty(0, np.float32)])


def calibrated(sae: Sae, rows: Array) -> Sae:
    """A topk SAE as a jumprelu one, with the one threshold above which k features fire on average over rows
    [tokens, width].

    It is an approximation: a feature no longer depends on the others of its token, and the number that fires varies.
    Any other SAE is returned as it is.
    """
    if sae.k is None:
        return sae
    # No token has so many above the threshold, whatever the others have, unless it is unlike all of them.
    most = min(8 * sae.k, len(sae.encoder))
    largest = []
    for start in range(0, len(rows), CHUNK):
        z = sae.pre(np.asarray(rows[start : start + CHUNK], np.float32))
        largest.append(np.partition(z, -most, axis=1)[:, -most:].ravel())
    pooled = np.concatenate(largest)
    cut = float(np.partition(pooled, -sae.k * len(rows))[-sae.k * len(rows)])
    threshold = np.full(len(sae.encoder), max(cut, 0.0), np.float32)
    return replace(sae, activation="jumprelu", threshold=threshold, k=None)
