from __future__ import annotations

import numpy as np
import pytest

from methods import rfm

HIDDEN = 12


def even_concept(seed: int, samples: int = 400) -> tuple[rfm.Array, rfm.Array, np.ndarray]:
    """Positive where (x . u)^2 > 0.6: the means of the two sides agree."""
    rng = np.random.default_rng(seed)
    u = rng.standard_normal(HIDDEN)
    u /= np.linalg.norm(u)
    x = rng.standard_normal((samples, HIDDEN)).astype(np.float32)
    inside = (x @ u) ** 2 > 0.6
    return x[inside], x[~inside], u


@pytest.mark.parametrize("kind", ["laplace", "gaussian"])
def test_the_gradient_is_that_of_finite_differences(kind: rfm.Kernel) -> None:
    rng = np.random.default_rng(0)
    centres, points = rng.standard_normal((9, 4)), rng.standard_normal((5, 4))
    weights, root = rng.standard_normal(9), rng.standard_normal((4, 4))
    metric = root @ root.T
    found = rfm.gradients(points, centres, weights, metric, 2.0, kind)
    for axis, step in enumerate(1e-6 * np.eye(4)):
        up, down = (rfm.kernel(points + side * step, centres, metric, 2.0, kind) @ weights for side in (1, -1))
        np.testing.assert_allclose(found[:, axis], (up - down) / 2e-6, atol=1e-7)


def by_the_formula(samples: np.ndarray, labels: np.ndarray, bandwidth: float, iterations: int) -> np.ndarray:
    """The paper's recursion with a Laplace kernel, sample by sample, and the metric divided by its maximum."""
    metric = np.eye(samples.shape[1])
    for _ in range(iterations):
        distance = np.array([[np.sqrt((x - z) @ metric @ (x - z)) for z in samples] for x in samples])
        gram = np.exp(-distance / bandwidth)
        beta = np.linalg.solve(gram + 1e-3 * np.eye(len(samples)), labels - labels.mean())
        total = np.zeros_like(metric)
        for j, z in enumerate(samples):
            gradient = sum(
                beta[k] * gram[k, j] / distance[k, j] / bandwidth * metric @ (x - z)
                for k, x in enumerate(samples)
                if k != j
            )
            total += np.outer(gradient, gradient)
        metric = total / total.max()
    return metric


def test_the_direction_is_that_of_the_recursion_written_out() -> None:
    positive, negative, _ = even_concept(0, 60)
    median = 1.5
    config = rfm.Config(iterations=1, bandwidths=(median,), centred=(False,))
    fitted = rfm.fit(positive, negative, config)
    train = [side[np.arange(len(side)) % 5 != 4] for side in (positive, negative)]
    labels = np.repeat([1.0, 0.0], [len(side) for side in train])
    metric = by_the_formula(np.concatenate(train).astype(np.float64), labels, fitted.bandwidth, 1)
    expected = np.linalg.eigh(metric)[1][:, -1]
    assert abs(fitted.direction @ expected) == pytest.approx(1, abs=1e-5)


def test_the_second_iteration_uses_the_metric_of_the_first() -> None:
    positive, negative, _ = even_concept(1, 60)
    config = rfm.Config(iterations=3, bandwidths=(1.0,), centred=(False,))
    samples = np.concatenate([positive, negative]).astype(np.float64)
    labels = np.repeat([1.0, 0.0], [len(positive), len(negative)])
    held_out = np.zeros(len(samples), bool)
    held_out[[0, -1]] = True
    candidates = list(rfm._iterate(samples, labels, held_out, 5.0, False, config))
    expected = by_the_formula(samples[1:-1], labels[1:-1], 5.0, 3)
    np.testing.assert_allclose(candidates[-1].metric, expected, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_an_even_concept_is_found_where_the_means_do_not_differ(seed: int) -> None:
    positive, negative, u = even_concept(seed)
    fitted = rfm.fit(positive, negative, rfm.Config())
    contrast = positive.mean(0) - negative.mean(0)
    assert abs(fitted.direction @ u) > 0.95
    assert abs(contrast @ u) / np.linalg.norm(contrast) < 0.6
    assert fitted.correlation < 0.2 and fitted.auc > 0.9


def test_swapping_the_sides_turns_the_direction_round() -> None:
    rng = np.random.default_rng(0)
    base, shift = rng.standard_normal((2, 60, HIDDEN)).astype(np.float32), rng.standard_normal(HIDDEN)
    positive, negative = base[0] + shift.astype(np.float32), base[1]
    forward, back = rfm.fit(positive, negative, rfm.Config()), rfm.fit(negative, positive, rfm.Config())
    assert forward.direction @ back.direction < -0.99
    assert forward.direction @ shift > 0


def test_the_auc_counts_pairs_in_the_right_order_with_ties_as_half() -> None:
    scores, labels = np.array([3.0, 1.0, 2.0, 2.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    pairs = [(a > b) + (a == b) / 2 for a in scores[labels > 0] for b in scores[labels == 0]]
    assert rfm.auc(scores, labels) == pytest.approx(np.mean(pairs))


def test_a_bandwidth_that_makes_every_gradient_vanish_is_refused() -> None:
    positive, negative, _ = even_concept(0, 60)
    with pytest.raises(ValueError, match="no bandwidth"):
        rfm.fit(positive, negative, rfm.Config(kernel="gaussian", bandwidths=(1e-6,)))


def test_too_few_samples_and_equal_samples_are_refused() -> None:
    ones = np.ones((10, HIDDEN), np.float32)
    with pytest.raises(ValueError, match="at least 5"):
        rfm.fit(ones[:4], ones, rfm.Config())
    with pytest.raises(ValueError, match="all the same"):
        rfm.fit(ones, ones, rfm.Config())
