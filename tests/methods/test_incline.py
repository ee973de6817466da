from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from methods import incline

PAIRS, LAYERS, WIDTH = 60, 3, 24


def config(**changes: Any) -> incline.Config:
    return incline.Config(**{"source_language": "sw"} | changes)


def translations(
    pairs: int = PAIRS, width: int = WIDTH, layers: int = LAYERS, noise: float = 0.0, seed: int = 0
) -> tuple[incline.Array, incline.Array, np.ndarray]:
    """Source and target states [pairs, layers, width], and the planted maps [layers, width, width] between them."""
    rng = np.random.default_rng(seed)
    source = rng.standard_normal((pairs, layers, width))
    maps = rng.standard_normal((layers, width, width)) / np.sqrt(width)
    target = np.einsum("lij,plj->pli", maps, source) + noise * rng.standard_normal(source.shape)
    return source.astype(np.float32), target.astype(np.float32), maps


def released(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The released code's map of one layer, written from the specification, in the paper's orientation."""
    return np.linalg.lstsq(source.astype(np.float64), target.astype(np.float64), rcond=None)[0].T


def relative(predicted: np.ndarray, target: np.ndarray) -> float:
    return float(((predicted - target) ** 2).sum() / ((target - target.mean(0)) ** 2).sum())


@pytest.mark.parametrize("solver", ["ridge", "min_norm"])
def test_a_known_map_is_recovered(solver: incline.Solver) -> None:
    source, target, planted = translations()
    for fitted, wanted in zip(incline.fit(source, target, config(solver=solver)), planted, strict=True):
        np.testing.assert_allclose(fitted.dense, wanted, atol=2e-2 if solver == "ridge" else 1e-5)
        assert fitted.error < 1e-3 < fitted.identity_error
        assert fitted.matrix is not None and fitted.rank_error == 0


@pytest.mark.parametrize(("pairs", "width"), [(60, 24), (24, 24), (20, 64), (10, 64)])
def test_min_norm_equals_the_released_arithmetic(pairs: int, width: int) -> None:
    source, target, _ = translations(pairs, width, noise=0.3)
    for layer, fitted in enumerate(incline.fit(source, target, config(solver="min_norm"))):
        expected = released(source[:, layer], target[:, layer])
        np.testing.assert_allclose(fitted.dense, expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-4)
        assert (fitted.matrix is None) == (2 * pairs < width)
        if fitted.left is not None and fitted.right is not None:
            assert (fitted.left.shape, fitted.right.shape) == ((width, pairs), (pairs, width))


@pytest.mark.parametrize(("pairs", "width"), [(60, 24), (20, 64)])
def test_ridge_is_its_formula(pairs: int, width: int) -> None:
    source, target, _ = translations(pairs, width, noise=0.3)
    (fitted, *_) = incline.fit(source, target, config(ridge=0.1))
    h, t = source[:, 0].astype(np.float64), target[:, 0].astype(np.float64)
    penalty = 0.1 * np.mean(np.diag(h @ h.T))
    dual = (h.T @ np.linalg.inv(h @ h.T + penalty * np.eye(pairs)) @ t).T
    primal = (np.linalg.inv(h.T @ h + penalty * np.eye(width)) @ h.T @ t).T
    np.testing.assert_allclose(dual, primal, atol=1e-9)
    np.testing.assert_allclose(fitted.dense, dual, atol=1e-6)
    assert fitted.ridge == 0.1


@pytest.mark.parametrize(("pairs", "width"), [(30, 12), (12, 12), (9, 20)])
@pytest.mark.parametrize("changes", [{"ridge": 0.03}, {"solver": "min_norm"}])
def test_the_error_is_that_of_maps_fitted_without_each_sentence(pairs: int, width: int, changes: Any) -> None:
    source, target, _ = translations(pairs, width, layers=1, noise=0.5)
    (fitted,) = incline.fit(source, target, config(**changes))
    h, t = source[:, 0].astype(np.float64), target[:, 0].astype(np.float64)
    penalty = changes.get("ridge", 0) * (h**2).sum(1).mean()
    wrong = baseline = 0.0
    for left_out in range(pairs):
        rest = [row for row in range(pairs) if row != left_out]
        gram = h[rest] @ h[rest].T + penalty * np.eye(pairs - 1)
        predicted = h[left_out] @ h[rest].T @ np.linalg.pinv(gram, rcond=1e-12) @ t[rest]
        wrong += ((predicted - t[left_out]) ** 2).sum()
        baseline += ((t[rest].mean(0) - t[left_out]) ** 2).sum()
    assert fitted.error == pytest.approx(wrong / baseline, rel=1e-5)


def test_ridge_has_no_collapse_near_as_many_pairs_as_dimensions() -> None:
    source, target, planted = translations(400, 64, layers=1, noise=1.0, seed=3)
    held_out = source[200:, 0], target[200:, 0]
    errors = {}
    for pairs in (16, 40, 64, 80, 200):
        for solver in ("ridge", "min_norm"):
            (fitted,) = incline.fit(source[:pairs], target[:pairs], config(solver=solver))
            errors[solver, pairs] = relative(held_out[0] @ fitted.dense.T, held_out[1])
    assert errors["min_norm", 64] > 10 > 1 > errors["ridge", 64]
    ridge = [errors["ridge", pairs] for pairs in (16, 40, 64, 80, 200)]
    assert ridge == sorted(ridge, reverse=True)
    assert all(errors["ridge", pairs] <= errors["min_norm", pairs] for pairs in (16, 40, 64, 80, 200))


def test_the_chosen_ridge_is_near_the_best_one_for_new_sentences() -> None:
    source, target, _ = translations(460, 64, layers=1, noise=1.0)
    (chosen,) = incline.fit(source[:60], target[:60], config())
    held_out = {}
    for ridge in incline.RIDGES:
        (fitted,) = incline.fit(source[:60], target[:60], config(ridge=ridge))
        held_out[ridge] = relative(source[60:, 0] @ fitted.dense.T, target[60:, 0])
    assert held_out[chosen.ridge] < 1.05 * min(held_out.values())
    assert chosen.error == pytest.approx(held_out[chosen.ridge], rel=0.15)


def test_a_planted_rank_costs_nothing_and_a_smaller_one_what_the_error_says() -> None:
    rng = np.random.default_rng(0)
    source = rng.standard_normal((200, 1, WIDTH)).astype(np.float32)
    planted = rng.standard_normal((WIDTH, 4)) @ rng.standard_normal((4, WIDTH))
    target = (source[:, 0] @ planted.T)[:, None].astype(np.float32)
    (exact,) = incline.fit(source, target, config(solver="min_norm", rank=4))
    assert exact.left is not None and exact.left.shape == (WIDTH, 4)
    np.testing.assert_allclose(exact.dense, planted, atol=1e-4)
    assert exact.rank_error < 1e-9
    (whole,) = incline.fit(source, target, config(ridge=0.1))
    for rank in (1, 2, 3):
        (fitted,) = incline.fit(source, target, config(ridge=0.1, rank=rank))
        predicted, wanted = source[:, 0] @ fitted.dense.T, source[:, 0] @ whole.dense.T
        assert fitted.rank_error == pytest.approx(((predicted - wanted) ** 2).sum() / (wanted**2).sum(), rel=1e-3)
        assert fitted.error > whole.error


def test_no_other_map_of_the_rank_has_a_lower_ridge_loss() -> None:
    source, target, _ = translations(80, WIDTH, layers=1, noise=1.0)
    (fitted,) = incline.fit(source, target, config(ridge=0.1, rank=3))
    h, t = source[:, 0].astype(np.float64), target[:, 0].astype(np.float64)
    penalty = 0.1 * (h**2).sum(1).mean()

    def loss(w: np.ndarray) -> float:
        return float(((h @ w.T - t) ** 2).sum() + penalty * (w**2).sum())

    rng = np.random.default_rng(1)
    assert fitted.left is not None and fitted.right is not None
    best = loss(fitted.dense.astype(np.float64))
    for scale in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            left = fitted.left + scale * rng.standard_normal(fitted.left.shape)
            right = fitted.right + scale * rng.standard_normal(fitted.right.shape)
            assert loss(left @ right) > best
    u, s, v = np.linalg.svd(incline.fit(source, target, config(ridge=0.1))[0].dense.astype(np.float64))
    assert loss((u[:, :3] * s[:3]) @ v[:3]) >= best


def test_every_second_pair_is_mixed_as_in_the_released_code() -> None:
    assert incline.mixed("habari", "news", 0, "source_first") == ("habari", "news")
    assert incline.mixed("habari", "news", 1, "source_first") == ("habari news", "news news")
    assert incline.mixed("habari", "news", 1, "target_first") == ("news\nhabari", "news\nnews")
    assert incline.mixed("habari", "news", 1, "none") == ("habari", "news")


def test_what_nothing_can_be_fitted_from_is_refused() -> None:
    source, target, _ = translations()
    with pytest.raises(ValueError, match="at least 3 pairs"):
        incline.fit(source[:2], target[:2], config())
    with pytest.raises(ValueError, match="equal shapes"):
        incline.fit(source, target[:-1], config())
    with pytest.raises(ValueError, match="rank 25 must be from 1 to 24"):
        incline.fit(source, target, config(rank=25))
    with pytest.raises(ValueError, match="no ridge"):
        incline.fit(source, target, config(solver="min_norm", ridge=0.1))
    with pytest.raises(ValueError, match="all equal"):
        incline.fit(source, np.ones_like(target), config())
