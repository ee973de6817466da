"""A direction from two sets of activations, four ways under one interface, so that they can be compared.

For samples p [n, hidden] and q [m, hidden] at a layer, with u the unit direction:

    mean_difference:  u along mean(p) - mean(q)
    pca:              u the first right singular vector of the differences p_i - q_i of pairs [n, hidden]
    logistic:         u along the weights w of min mean_k log(1 + exp(-t_k (w . x_k + c))) + penalty / 2 ||w||^2, t =
    +-1,
                      the x centred and scaled by one number to a mean variance of 1 per coordinate
    rfm:              u from a Recursive Feature Machine (methods/rfm.py)

All have the sign that makes p lie above q, and a vector is u times u . (mean(p) - mean(q)): a strength of 1 is one
average contrast, whichever the extractor. `correlation` is between samples along u and their label; below 0.1
(`STEERABLE`) steering along u has no defined sense, which happens where a concept is even in x.

mean_difference: Rimsky et al. 2024 (CAA), eq. 1. pca: Zou et al. 2023, "Representation engineering", 3.1. logistic: the
probe of Li et al. 2023 (ITI). rfm: Beaglehole et al. 2025, and ExpertSteer.

Beside them, two things that are made of directions:

- Directional ablation (Arditi et al. 2024, "Refusal in language models is mediated by a single direction"):
  x -= u (u . x) with the u of ONE layer at all layers: `everywhere`, served with `op: "ablate"`.
- Conditional steering (Lee et al. 2025, "Programming refusal with conditional activation steering"): the layer,
  threshold and side at which the cosine of x and a vector tells p from q best: `condition`, served as a `condition`.
  The paper compares x with its projection on the vector, which is |cosine|; here the sign counts, as it does in its
  code for thresholds above 0 where the vector points towards p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from methods import rfm

Array = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Extractor = Literal["mean_difference", "pca", "logistic", "rfm"]
STEERABLE = 0.1
NEWTON_STEPS = 100


@dataclass(frozen=True, slots=True)
class Config:
    """`penalty` is for logistic: the larger, the nearer to the mean difference."""

    extractor: Extractor = "mean_difference"
    penalty: float = 0.01
    rfm: rfm.Config = rfm.Config()


@dataclass(frozen=True, slots=True)
class Directions:
    """`vectors` [layers, hidden]; `correlations` and held-out `aucs` [layers]: how well samples along the direction
    tell the sides apart. The AUC is that of a direction fitted without a fifth of the samples, on these.
    """

    vectors: Array
    correlations: Array
    aucs: Array


def extract(positive: Array, negative: Array, config: Config) -> Directions:
    """Fit from activations [n, layers, hidden] and [m, layers, hidden], float32; pca takes pairs, so n = m.

    ValueError for shapes that don't fit together, or fewer than 2 samples a side (5 for rfm).
    """
    check_shapes(positive, negative, paired=config.extractor == "pca")
    layers = range(positive.shape[1])
    each = [_layer(positive[:, layer], negative[:, layer], config) for layer in layers]
    vectors, correlations, aucs = zip(*each, strict=True)
    return Directions(np.stack(vectors), np.array(correlations, np.float32), np.array(aucs, np.float32))


def check_shapes(positive: Array, negative: Array, *, paired: bool) -> None:
    if positive.ndim != 3 or negative.ndim != 3 or positive.shape[1:] != negative.shape[1:]:
        raise ValueError(f"need [samples, layers, hidden] twice, got {positive.shape} and {negative.shape}")
    if paired and len(positive) != len(negative):
        raise ValueError(f"need as many positive as negative samples, got {len(positive)} and {len(negative)}")
    if min(len(positive), len(negative)) < 2:
        raise ValueError(f"need at least 2 samples a side, got {len(positive)} and {len(negative)}")


def mean_difference(positive: Array, negative: Array) -> Array:
    """mean(p) - mean(q) over the first axis."""
    difference: Array = positive.mean(axis=0) - negative.mean(axis=0)
    return difference


def principal(differences: Array) -> Array:
    """The first right singular vector [hidden] of differences [pairs, hidden], not centred; its sign is arbitrary."""
    first: Array = np.linalg.svd(differences, full_matrices=False)[2][0]
    return first


def logistic(positive: Array, negative: Array, penalty: float) -> tuple[Float64, float]:
    """Weights [hidden] and intercept of the ridge logistic probe, for samples as they are. ValueError where Newton's
    method doesn't converge.

    It is solved in the span of the samples, where the penalty is the same and Newton's method is small.
    """
    samples = np.concatenate([positive, negative]).astype(np.float64)
    targets = np.repeat([1.0, -1.0], [len(positive), len(negative)])
    centre = samples.mean(0)
    left, sizes, basis = np.linalg.svd(samples - centre, full_matrices=False)
    scale = float(np.sqrt((sizes**2).sum() / samples.size))
    if scale == 0:
        return np.zeros(samples.shape[1]), 0.0
    reduced = np.column_stack([left * (sizes / scale), np.ones(len(samples))])
    ridge = np.append(np.full(len(sizes), penalty), 0.0)
    solved = _newton(reduced, targets, ridge)
    weights = solved[:-1] @ basis / scale
    return weights, float(solved[-1] - weights @ centre)


def everywhere(vectors: Array, layer: int) -> Array:
    """The vector of one layer at all layers [layers, hidden], for directional ablation. IndexError for a wrong one."""
    return np.repeat(vectors[layer][None], len(vectors), axis=0)


@dataclass(frozen=True, slots=True)
class Condition:
    """Open where the cosine of x and the vector at `layer` is above (or, without `above`, below) the threshold.

    `f1` is that of "open means p" on the samples it was chosen on, `held_out_f1` on a fifth that took no part.
    """

    layer: int
    threshold: float
    above: bool
    f1: float
    held_out_f1: float


def condition(positive: Array, negative: Array, vectors: Array) -> Condition:
    """The best layer, threshold and side by F1, for activations [n, layers, hidden] and vectors [layers, hidden].

    ValueError for fewer than 5 samples a side.
    """
    check_shapes(positive, negative, paired=False)
    if min(len(positive), len(negative)) < rfm.HELD_OUT:
        raise ValueError(f"need at least {rfm.HELD_OUT} samples a side, got {len(positive)} and {len(negative)}")
    samples = np.concatenate([positive, negative])
    labels = np.repeat([True, False], [len(positive), len(negative)])
    held_out = held_out_fifth(len(positive), len(negative))
    norms = np.linalg.norm(samples, axis=2) * np.linalg.norm(vectors, axis=1)
    cosines = np.einsum("nlh,lh->nl", samples, vectors) / np.maximum(norms, np.finfo(np.float32).tiny)
    found = [
        (*_threshold(cosines[~held_out, layer] * (1 if above else -1), labels[~held_out]), layer, above)
        for layer in range(len(vectors))
        for above in (True, False)
    ]
    f1, threshold, layer, above = max(found, key=lambda each: each[0])
    signed = cosines[held_out, layer] * (1 if above else -1)
    held_out_f1 = _f1(signed > threshold, labels[held_out])
    return Condition(layer, threshold if above else -threshold, above, f1, held_out_f1)


def held_out_fifth(positives: int, negatives: int) -> npt.NDArray[np.bool_]:
    """Every fifth sample of each side, one behind the other."""
    return np.concatenate([np.arange(side) % rfm.HELD_OUT == rfm.HELD_OUT - 1 for side in (positives, negatives)])


def _layer(positive: Array, negative: Array, config: Config) -> tuple[Array, float, float]:
    """Vector, correlation and held-out AUC of one layer."""
    direction = _directions[config.extractor](positive, negative, config)
    contrast = mean_difference(positive, negative).astype(np.float64)
    samples = np.concatenate([positive, negative]).astype(np.float64)
    labels = np.repeat([1.0, 0.0], [len(positive), len(negative)])
    vector = (contrast @ direction * direction).astype(np.float32)
    return vector, abs(rfm.correlation(samples @ direction, labels)), _held_out_auc(positive, negative, config)


def _held_out_auc(positive: Array, negative: Array, config: Config) -> float:
    """nan where there are too few samples to hold some out."""
    held_out = held_out_fifth(len(positive), len(negative))
    above, below = positive[held_out[: len(positive)]], negative[held_out[len(positive) :]]
    kept = positive[~held_out[: len(positive)]], negative[~held_out[len(positive) :]]
    if min(map(len, (above, below))) == 0 or min(map(len, kept)) < rfm.HELD_OUT:
        return float("nan")
    direction = _directions[config.extractor](*kept, config)
    sign = 1.0 if mean_difference(*kept) @ direction >= 0 else -1.0
    scores = sign * np.concatenate([above, below]).astype(np.float64) @ direction
    return rfm.auc(scores, np.repeat([1.0, 0.0], [len(above), len(below)]))


def _newton(samples: Float64, targets: Float64, ridge: Float64) -> Float64:
    """Newton's method with halved steps for mean_k log(1 + exp(-t_k w . x_k)) + sum_j ridge_j w_j^2 / 2."""

    def loss(weights: Float64) -> float:
        return float(np.logaddexp(0, -targets * (samples @ weights)).mean() + (ridge * weights**2).sum() / 2)

    weights = np.zeros(samples.shape[1])
    for _ in range(NEWTON_STEPS):
        wrong = 1 / (1 + np.exp(np.clip(targets * (samples @ weights), -500, 500)))
        gradient = -samples.T @ (targets * wrong) / len(samples) + ridge * weights
        if np.abs(gradient).max() < 1e-8:
            return weights
        hessian = (samples.T * (wrong * (1 - wrong))) @ samples / len(samples) + np.diag(ridge + 1e-12)
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while loss(weights - size * step) > loss(weights) + 1e-12 and size > 1e-6:
            size /= 2
        weights = weights - size * step
    raise ValueError("the logistic probe doesn't converge; use a larger penalty")


def _threshold(values: Array, labels: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """The best F1 of "a value above the threshold is positive", and the threshold: half-way between two values."""
    found = np.unique(values.astype(np.float64))
    cuts = np.concatenate([[found[0] - 1e-3], (found[1:] + found[:-1]) / 2])
    true = (values[labels] > cuts[:, None]).sum(1)
    false = (values[~labels] > cuts[:, None]).sum(1)
    scores = 2 * true / (true + false + labels.sum())
    best = int(np.argmax(scores))
    return float(scores[best]), float(cuts[best])


def _f1(chosen: npt.NDArray[np.bool_], labels: npt.NDArray[np.bool_]) -> float:
    return float(2 * (chosen & labels).sum() / (chosen.sum() + labels.sum()))


def _unit(vector: npt.NDArray[np.floating]) -> Float64:
    wide = vector.astype(np.float64)
    length = np.linalg.norm(wide)
    return wide / length if length else wide


_directions: dict[Extractor, Callable[[Array, Array, Config], Float64]] = {
    "mean_difference": lambda positive, negative, _: _unit(mean_difference(positive, negative)),
    "pca": lambda positive, negative, _: _unit(principal(positive - negative)),
    "logistic": lambda positive, negative, config: _unit(logistic(positive, negative, config.penalty)[0]),
    "rfm": lambda positive, negative, config: _unit(rfm.fit(positive, negative, config.rfm).direction),
}
