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
@pytest.mark.parametrize("prior", ["mean", "identity"])
def test_ridge_is_its_formula(pairs: int, width: int, prior: incline.Prior) -> None:
    source, target, _ = translations(pairs, width, noise=0.3)
    source, target = source + 2, target - 1
    (fitted, *_) = incline.fit(source, target, config(ridge=0.1, prior=prior))
    h, t = source[:, 0].astype(np.float64), target[:, 0].astype(np.float64)
    hc, tc = h - h.mean(0), t - t.mean(0)
    known = np.eye(width) if prior == "identity" else np.zeros((width, width))
    wanted = tc - hc @ known
    penalty = 0.1 * np.mean(np.diag(hc @ hc.T))
    dual = (hc.T @ np.linalg.inv(hc @ hc.T + penalty * np.eye(pairs)) @ wanted).T
    primal = (np.linalg.inv(hc.T @ hc + penalty * np.eye(width)) @ hc.T @ wanted).T
    np.testing.assert_allclose(dual, primal, atol=1e-9)
    np.testing.assert_allclose(fitted.dense, known + dual, atol=1e-6)
    assert fitted.bias is not None
    np.testing.assert_allclose(fitted.bias, t.mean(0) - (known + dual) @ h.mean(0), atol=1e-5)
    assert (fitted.ridge, fitted.prior) == (0.1, prior)
    assert (fitted.matrix is None) == (2 * pairs < width and prior == "mean")


def predicted_without(h: np.ndarray, t: np.ndarray, rest: list[int], one: int, penalty: float, prior: str) -> Any:
    """What a map that is fitted to the rest says of one sentence."""
    mean_h, mean_t = h[rest].mean(0), t[rest].mean(0)
    hc, tc = h[rest] - mean_h, t[rest] - mean_t
    new = h[one] - mean_h
    known = hc if prior == "identity" else 0 * hc
    change = new @ hc.T @ np.linalg.inv(hc @ hc.T + penalty * np.eye(len(rest))) @ (tc - known)
    return mean_t + (new if prior == "identity" else 0) + change


@pytest.mark.parametrize(("pairs", "width"), [(30, 12), (12, 12), (9, 20)])
@pytest.mark.parametrize(
    "changes", [{"ridge": 0.03, "prior": "mean"}, {"ridge": 0.03, "prior": "identity"}, {"solver": "min_norm"}]
)
def test_the_error_is_that_of_maps_fitted_without_each_sentence(pairs: int, width: int, changes: Any) -> None:
    source, target, _ = translations(pairs, width, layers=1, noise=0.5)
    (fitted,) = incline.fit(source, target, config(**changes))
    h, t = source[:, 0].astype(np.float64), target[:, 0].astype(np.float64)
    penalty = changes.get("ridge", 0) * ((h - h.mean(0)) ** 2).sum(1).mean()
    wrong = baseline = 0.0
    for left_out in range(pairs):
        rest = [row for row in range(pairs) if row != left_out]
        if "prior" in changes:
            predicted = predicted_without(h, t, rest, left_out, penalty, changes["prior"])
        else:
            predicted = h[left_out] @ h[rest].T @ np.linalg.pinv(h[rest] @ h[rest].T, rcond=1e-12) @ t[rest]
        wrong += ((predicted - t[left_out]) ** 2).sum()
        baseline += ((t[rest].mean(0) - t[left_out]) ** 2).sum()
    assert fitted.error == pytest.approx(wrong / baseline, rel=1e-5)


@pytest.mark.parametrize("pairs", [6, 20, 60])
def test_no_map_is_worse_than_the_mean_or_than_doing_nothing(pairs: int) -> None:
    """By the error that a fit knows: where the source says nothing, where it says all, and in between."""
    rng = np.random.default_rng(0)
    source = rng.standard_normal((pairs, 1, WIDTH)).astype(np.float32) + 3
    noise = rng.standard_normal((pairs, 1, WIDTH)).astype(np.float32)
    for share in (0.0, 0.3, 0.9):
        (fitted,) = incline.fit(source, share * source + (1 - share) * noise, config())
        assert fitted.error <= min(1, fitted.identity_error) + 1e-9
    (unknown,) = incline.fit(source, noise, config())
    assert unknown.error == pytest.approx(1, abs=0.02) and unknown.prior == "mean"
    (same,) = incline.fit(source, source, config())
    assert same.error == 0 and same.prior == "identity" and same.ridge == np.inf
    np.testing.assert_array_equal(same.predict(source[:, 0]), source[:, 0])


def test_a_pair_with_a_target_much_longer_than_the_others_is_left_out_unless_there_are_many() -> None:
    source, target, _ = translations(60, layers=1, noise=1.0)
    odd_source, odd_target = source.copy(), target.copy()
    odd_source[7] *= 30
    odd_target[7] = odd_source[7]
    (clean,) = incline.fit(np.delete(source, 7, 0), np.delete(target, 7, 0), config())
    (robust,) = incline.fit(odd_source, odd_target, config())
    assert (clean.outliers, robust.outliers) == (0, 1)
    np.testing.assert_array_equal(robust.dense, clean.dense)
    assert robust.error == clean.error
    (papers,) = incline.fit(odd_source, odd_target, config(solver="min_norm"))
    assert papers.outliers == 0
    np.testing.assert_allclose(papers.dense, released(odd_source[:, 0], odd_target[:, 0]), atol=1e-4)
    odd_target[:10] *= 30
    (many,) = incline.fit(source, odd_target, config())
    assert many.outliers == 0


def test_a_long_source_with_an_ordinary_target_teaches_the_map_to_shorten_its_kind() -> None:
    source, target, _ = translations(120, layers=1, noise=0.3)
    long = np.random.default_rng(5).standard_normal(WIDTH).astype(np.float32) * 20
    source[[3, 60, 90, 110], 0] = long + source[[3, 60, 90, 110], 0]
    (fitted,) = incline.fit(source[:100], target[:100], config())
    assert fitted.outliers == 0
    predicted = fitted.predict(source[110])
    assert np.linalg.norm(predicted) < 0.2 * np.linalg.norm(long)


def test_a_constant_difference_is_found_by_the_bias() -> None:
    rng = np.random.default_rng(0)
    source = rng.standard_normal((20, 1, 64)).astype(np.float32)
    difference = 5 * rng.standard_normal(64).astype(np.float32)
    noise = 0.01 * rng.standard_normal(source.shape).astype(np.float32)
    (fitted,) = incline.fit(source, source + difference + noise, config())
    assert fitted.prior == "identity" and fitted.error < 1e-3 < 1 < fitted.identity_error
    new = rng.standard_normal((5, 64)).astype(np.float32)
    np.testing.assert_allclose(fitted.predict(new), new + difference, atol=0.05)
    (without,) = incline.fit(source, source + difference + noise, config(prior="mean"))
    assert without.error > 0.1 and without.matrix is None


def test_ridge_has_no_collapse_near_as_many_pairs_as_dimensions() -> None:
    source, target, planted = translations(400, 64, layers=1, noise=1.0, seed=3)
    held_out = source[200:, 0], target[200:, 0]
    errors = {}
    for pairs in (16, 40, 64, 80, 200):
        for solver in ("ridge", "min_norm"):
            (fitted,) = incline.fit(source[:pairs], target[:pairs], config(solver=solver))
            errors[solver, pairs] = relative(fitted.predict(held_out[0]), held_out[1])
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
        held_out[ridge] = relative(fitted.predict(source[60:, 0]), target[60:, 0])
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
    (whole,) = incline.fit(source, target, config(ridge=0.1, prior="mean"))
    for rank in (1, 2, 3):
        (fitted,) = incline.fit(source, target, config(ridge=0.1, rank=rank))
        mean = target[:, 0].mean(0)
        predicted, wanted = fitted.predict(source[:, 0]) - mean, whole.predict(source[:, 0]) - mean
        assert fitted.rank_error == pytest.approx(((predicted - wanted) ** 2).sum() / (wanted**2).sum(), rel=1e-3)
        assert fitted.error > whole.error


def test_no_other_map_of_the_rank_has_a_lower_ridge_loss() -> None:
    source, target, _ = translations(80, WIDTH, layers=1, noise=1.0)
    (fitted,) = incline.fit(source, target, config(ridge=0.1, rank=3))
    h, t = (x[:, 0].astype(np.float64) - x[:, 0].mean(0, dtype=np.float64) for x in (source, target))
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
    (whole,) = incline.fit(source, target, config(ridge=0.1, prior="mean"))
    u, s, v = np.linalg.svd(whole.dense.astype(np.float64))
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
    for penalised in ({"ridge": 0.1}, {"prior": "mean"}):
        with pytest.raises(ValueError, match="neither ridge nor prior"):
            incline.fit(source, target, config(solver="min_norm", **penalised))
    with pytest.raises(ValueError, match="no smaller rank"):
        incline.fit(source, target, config(rank=3, prior="identity"))
    with pytest.raises(ValueError, match="source states are all equal"):
        incline.fit(np.ones_like(source), target, config())
    with pytest.raises(ValueError, match="all equal"):
        incline.fit(source, np.ones_like(target), config())
