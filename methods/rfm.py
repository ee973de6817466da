"""The Recursive Feature Machine: the direction that a kernel machine found to matter for telling two sets apart.

Over samples x_k [hidden] with labels y_k (1 and 0, their mean subtracted), starting from M = I:

    K(x, z) = exp(-d(x, z) / sigma),  d(x, z) = sqrt((x - z)^T M (x - z))    "laplace", the default
    K(x, z) = exp(-d(x, z)^2 / sigma)                                         "gaussian", the form that is printed
    beta = (K(X, X) + ridge I)^-1 y;  pi(z) = sum_k beta_k K(x_k, z)
    M <- G^T G / max(G^T G), the rows of G [samples, hidden] being the gradients of pi at the samples

and the direction is the first eigenvector of the M that follows from the best pi, with the sign of its correlation with
the labels. It also finds concepts that are even in x, such as "far from the middle", where means don't differ; their
direction has no sign, and `correlation` is near 0.

Radhakrishnan et al. 2024, "Mechanism for feature learning in neural networks and backpropagation-free machine learning
models"; as a steering vector, Beaglehole et al. 2025, "Toward universal steering and monitoring of AI models".
Defaults are theirs: ridge 1e-3, M divided by its maximum, 8 iterations, gradients centred or not, the bandwidth and the
iteration by the AUC on held-out samples. They search bandwidths 1, 10 and 100; here a bandwidth is a multiple of the
samples' median distance, since the scale of activations differs by orders of magnitude between models and layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Kernel = Literal["laplace", "gaussian"]
HELD_OUT = 5
"""Every fifth sample of each side is held out."""


@dataclass(frozen=True, slots=True)
class Config:
    """`bandwidths` are multiples of the median distance of the samples (of its square for gaussian)."""

    kernel: Kernel = "laplace"
    iterations: int = 8
    ridge: float = 1e-3
    bandwidths: tuple[float, ...] = (0.5, 1.0, 2.0)
    centred: tuple[bool, ...] = (False, True)


@dataclass(frozen=True, slots=True)
class Fit:
    """`direction` [hidden], of length 1; `auc` of the chosen predictor on held-out samples; `correlation` of the
    samples along the direction with their labels; and what was chosen, `bandwidth` in units of the samples.
    """

    direction: Array
    auc: float
    correlation: float
    bandwidth: float
    centred: bool
    iteration: int


@dataclass(frozen=True, slots=True)
class _Candidate:
    metric: Float64
    auc: float
    error: float
    bandwidth: float
    centred: bool
    iteration: int


def fit(positive: Array, negative: Array, config: Config) -> Fit:
    """Fit from samples [n, hidden] and [m, hidden]. ValueError for fewer than 5 a side, samples that are all the same,
    or bandwidths none of which gives a finite gradient.
    """
    if min(len(positive), len(negative)) < HELD_OUT:
        raise ValueError(f"need at least {HELD_OUT} samples a side, got {len(positive)} and {len(negative)}")
    samples = np.concatenate([positive, negative]).astype(np.float64)
    labels = np.repeat([1.0, 0.0], [len(positive), len(negative)])
    held_out = np.concatenate([np.arange(len(side)) % HELD_OUT == HELD_OUT - 1 for side in (positive, negative)])
    median = _median_distance(samples[~held_out])
    if median == 0:
        raise ValueError("the samples are all the same; there is nothing to tell apart")
    scale = median if config.kernel == "laplace" else median**2
    candidates = [
        candidate
        for multiple in config.bandwidths
        for centred in config.centred
        for candidate in _iterate(samples, labels, held_out, multiple * scale, centred, config)
    ]
    if not candidates:
        raise ValueError(f"no bandwidth of {config.bandwidths} gives a finite gradient; try larger ones")
    best = max(candidates, key=lambda candidate: (candidate.auc, -candidate.error))
    direction = np.linalg.eigh(best.metric)[1][:, -1]
    along = correlation(samples @ direction, labels)
    signed = (direction if along >= 0 else -direction).astype(np.float32)
    return Fit(signed, best.auc, abs(along), best.bandwidth, best.centred, best.iteration)


def correlation(values: Float64, labels: Float64) -> float:
    """Pearson's, 0 where the values are constant."""
    deviation = values - values.mean()
    spread = float(np.linalg.norm(deviation) * np.linalg.norm(labels - labels.mean()))
    return float(deviation @ (labels - labels.mean())) / spread if spread else 0.0


def auc(scores: Float64, labels: Float64) -> float:
    """The chance that a positive sample scores above a negative one, ties counting half."""
    values, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    positives = int(labels.sum())
    return float((ranks[labels > 0].sum() - positives * (positives + 1) / 2) / (positives * (len(labels) - positives)))


def kernel(samples: Float64, centres: Float64, metric: Float64, bandwidth: float, kind: Kernel) -> Float64:
    """K [samples, centres]."""
    squared = _squared_distances(samples, centres, metric)
    values: Float64 = np.exp(-(np.sqrt(squared) if kind == "laplace" else squared) / bandwidth)
    return values


def gradients(
    points: Float64, centres: Float64, weights: Float64, metric: Float64, bandwidth: float, kind: Kernel
) -> Float64:
    """Of the predictor with those weights [centres], at the points: [points, hidden]. At a centre of a Laplace kernel,
    where that kernel has no gradient, its share is left out.
    """
    squared = _squared_distances(points, centres, metric)
    if kind == "laplace":
        distance = np.sqrt(squared)
        apart = distance > 1e-10
        pull = np.where(apart, np.exp(-distance / bandwidth) / np.where(apart, distance, 1.0), 0.0) / bandwidth
    else:
        pull = 2 * np.exp(-squared / bandwidth) / bandwidth
    pull = pull * weights
    sloped: Float64 = (pull @ centres - pull.sum(1, keepdims=True) * points) @ metric
    return sloped


def _iterate(
    samples: Float64, labels: Float64, held_out: npt.NDArray[np.bool_], bandwidth: float, centred: bool, config: Config
) -> Iterator[_Candidate]:
    """One candidate an iteration, until a gradient isn't finite or vanishes."""
    train, mean = samples[~held_out], labels[~held_out].mean()
    metric = np.eye(samples.shape[1])
    for iteration in range(config.iterations):
        gram = kernel(train, train, metric, bandwidth, config.kernel)
        gram[np.diag_indices_from(gram)] += config.ridge
        weights = np.linalg.solve(gram, labels[~held_out] - mean)
        scores = mean + kernel(samples[held_out], train, metric, bandwidth, config.kernel) @ weights
        gradient = gradients(train, train, weights, metric, bandwidth, config.kernel)
        if centred:
            gradient -= gradient.mean(0)
        metric = gradient.T @ gradient
        largest = metric.max()
        if not (np.isfinite(metric).all() and largest > 0):
            return
        metric /= largest
        error = float(((scores - labels[held_out]) ** 2).mean())
        yield _Candidate(metric, auc(scores, labels[held_out]), error, bandwidth, centred, iteration)


def _squared_distances(samples: Float64, centres: Float64, metric: Float64) -> Float64:
    mapped = samples @ metric
    own = np.einsum("nd,nd->n", mapped, samples)
    others = own if centres is samples else np.einsum("nd,nd->n", centres @ metric, centres)
    squared = own[:, None] + others - 2 * mapped @ centres.T
    if centres is samples:
        np.fill_diagonal(squared, 0.0)
    positive: Float64 = np.maximum(squared, 0.0)
    return positive


def _median_distance(samples: Float64) -> float:
    some = samples[:: max(len(samples) // 1000, 1)]
    squared = _squared_distances(some, some, np.eye(some.shape[1]))
    return float(np.sqrt(np.median(squared[np.triu_indices_from(squared, 1)])))
