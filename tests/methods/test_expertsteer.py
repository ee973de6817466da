from __future__ import annotations

import numpy as np
import pytest

from methods import expertsteer, rfm
from methods.expertsteer import Config, LayerPair

QUICK = rfm.Config(iterations=3, bandwidths=(1.0,), centred=(False,))


def correlated(rho: float, count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x, noise = rng.standard_normal((2, count))
    return x, rho * x + np.sqrt(1 - rho**2) * noise


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.6, 0.9])
def test_mutual_information_of_gaussians_is_the_closed_form(rho: float) -> None:
    found = np.mean([expertsteer.mutual_information(*correlated(rho, 2000, seed)) for seed in range(4)])
    assert found == pytest.approx(-0.5 * np.log(1 - rho**2), abs=0.04)


def by_counting(x: np.ndarray, y: np.ndarray, k: int) -> float:
    """The estimator of NPEET, with all pairs of points and a digamma by its recurrence."""

    def digamma(whole: int) -> float:
        return -0.5772156649015329 + sum(1 / j for j in range(1, whole))

    n = len(x)
    sums = 0.0
    for c in range(n):
        joint = np.maximum(abs(x - x[c]), abs(y - y[c]))
        radius = np.sort(joint)[k] - 1e-15
        sums += digamma(int((abs(x - x[c]) <= radius).sum())) + digamma(int((abs(y - y[c]) <= radius).sum()))
    return digamma(k) + digamma(n) - sums / n


@pytest.mark.parametrize(("k", "rho"), [(3, 0.0), (3, 0.8), (10, 0.5)])
def test_the_estimator_is_that_of_counting_all_pairs(k: int, rho: float) -> None:
    x, y = correlated(rho, 300)
    assert expertsteer.mutual_information(x, y, k) == pytest.approx(by_counting(x, y, k), abs=1e-9)


def test_mutual_information_is_large_for_equals_and_the_same_both_ways() -> None:
    x, y = correlated(0.7, 500)
    assert expertsteer.mutual_information(x, x) > 3
    found = expertsteer.mutual_information(x, y)
    assert expertsteer.mutual_information(8 * x + 2, 8 * y) == pytest.approx(found, abs=1e-9)
    assert expertsteer.mutual_information(y, x) == pytest.approx(found, abs=1e-9)
    tied = np.round(x, 1)
    assert np.isfinite(expertsteer.mutual_information(tied, tied))


def low_rank(texts: int, width: int, rank: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(99).standard_normal((rank, width))
    return (50 * (rng.standard_normal((texts, rank)) @ basis + 1)).astype(np.float32)


def test_an_auto_encoder_keeps_what_fits_through_it_and_its_seed_decides() -> None:
    states = low_rank(400, 20, 5)
    wide, narrow = expertsteer.auto_encoder(states, 8, 0), expertsteer.auto_encoder(states, 2, 0)
    assert wide.unexplained < 0.02
    assert narrow.unexplained > 0.2
    again, other = expertsteer.auto_encoder(states, 8, 0), expertsteer.auto_encoder(states, 8, 1)
    np.testing.assert_array_equal(again.matrix, wide.matrix)
    assert not np.allclose(other.matrix, wide.matrix, atol=1e-3)
    np.testing.assert_allclose(wide(states)[3], wide.matrix @ states[3] + wide.offset, rtol=1e-4)


def test_the_encoder_reconstructs_states_in_their_own_units() -> None:
    """A decoder fitted by least squares behind the encoder, on raw states: the scale must have been folded back."""
    states, fresh = low_rank(400, 20, 5), low_rank(100, 20, 5, seed=1)
    encoder = expertsteer.auto_encoder(states, 8, 0)
    coded = np.column_stack([encoder(states), np.ones(len(states))])
    decoder = np.linalg.lstsq(coded, states, rcond=None)[0]
    rebuilt = np.column_stack([encoder(fresh), np.ones(len(fresh))]) @ decoder
    assert ((rebuilt - fresh) ** 2).sum() / ((fresh - fresh.mean(0)) ** 2).sum() < 0.02


def test_a_mean_far_from_zero_costs_the_encoder_nothing_and_a_direction_keeps_its_length() -> None:
    """Real states share most of their length: with 150 texts, the error on new ones must be that of what doesn't fit
    through, not that of a mean which training had no time to learn.
    """
    rng = np.random.default_rng(0)
    scales = np.linspace(3, 0.1, 40)
    states = (rng.standard_normal((300, 40)) * scales + 200 * rng.standard_normal(40)).astype(np.float32)
    encoder = expertsteer.auto_encoder(states[:150], 30, 0)
    lost = np.sort(scales**2)[:10].sum() / (scales**2).sum()
    assert encoder.unexplained < 0.05 + 2 * lost
    coded, fresh = states[:150] @ encoder.matrix.T, states[150:]
    centred = np.linalg.pinv(coded - coded.mean(0)) @ (states[:150] - states[:150].mean(0))
    rebuilt = (fresh @ encoder.matrix.T - coded.mean(0)) @ centred + states[:150].mean(0)
    assert ((rebuilt - fresh) ** 2).sum() / ((fresh - fresh.mean(0)) ** 2).sum() < 0.1
    directions = np.eye(40, dtype=np.float32)
    lengths = np.linalg.norm(directions @ encoder.matrix.T, axis=1)
    assert 0.5 < np.median(lengths) < 1.5


def models(
    texts: int = 120, expert: int = 10, target: int = 6, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Expert states [texts, 3 layers] of both sides, split by a direction planted at each layer; the target's states
    [texts, 2 layers] of the positive texts, and the directions [3, expert].
    """
    rng = np.random.default_rng(seed)
    planted = rng.standard_normal((3, expert))
    planted /= np.linalg.norm(planted, axis=1, keepdims=True)
    negative, positive = rng.standard_normal((2, texts, 3, expert))
    return (
        (positive + 3 * planted).astype(np.float32),
        negative.astype(np.float32),
        rng.standard_normal((texts, 2, target)).astype(np.float32),
        planted,
    )


def test_vectors_are_the_aligned_directions_of_the_pairs_with_the_least_information() -> None:
    positive, negative, target, planted = models()
    config = Config(pairs=3, rfm=QUICK)
    found = expertsteer.fit(positive, negative, target, config)
    assert found.mutual_information.shape == (3, 2)
    least = sorted(found.mutual_information.ravel().tolist())[:3]
    assert [pair.mutual_information for pair in found.pairs] == pytest.approx(least)
    expected: dict[int, np.ndarray] = {}
    for pair in found.pairs:
        direction = rfm.fit(positive[:, pair.expert], negative[:, pair.expert], QUICK).direction
        assert abs(direction @ planted[pair.expert]) > 0.9
        encoder = expertsteer.auto_encoder(positive[:, pair.expert], 6, 0)
        expected[pair.target] = expected.get(pair.target, 0) + encoder.matrix @ direction + encoder.offset
    assert found.vectors.keys() == expected.keys()
    for layer, vector in expected.items():
        np.testing.assert_allclose(found.vectors[layer], vector, atol=1e-5)
    assert all(correlation > 0.5 for correlation in found.correlations.values())


def test_the_information_of_a_pair_is_the_mean_over_texts_of_that_between_coordinates() -> None:
    positive, negative, target, _ = models(target=30, expert=40)
    found = expertsteer.fit(positive, negative, target, Config(pairs=1, mutual_information_texts=7, rfm=QUICK))
    encoder = expertsteer.auto_encoder(positive[:, 1], 30, 0)
    coded = encoder(positive[:7, 1])
    states = [(coded[k].astype(np.float64), target[k, 0].astype(np.float64)) for k in range(7)]
    each = [by_counting(x / x.std(), y / y.std(), 3) for x, y in states]
    assert found.mutual_information[1, 0] == pytest.approx(np.mean(each), abs=1e-5)


def test_equal_widths_need_no_alignment_and_the_bias_is_an_option() -> None:
    positive, negative, target, _ = models(target=10)
    (pair,) = (found := expertsteer.fit(positive, negative, target, Config(pairs=1, rfm=QUICK))).pairs
    np.testing.assert_array_equal(
        found.vectors[pair.target], rfm.fit(positive[:, pair.expert], negative[:, pair.expert], QUICK).direction
    )
    positive, negative, target, _ = models()
    literal, linear = (
        expertsteer.fit(positive, negative, target, Config(pairs=1, affine=affine, rfm=QUICK))
        for affine in (True, False)
    )
    (pair,) = literal.pairs
    offset = expertsteer.auto_encoder(positive[:, pair.expert], 6, 0).offset
    np.testing.assert_allclose(literal.vectors[pair.target] - linear.vectors[pair.target], offset, atol=1e-6)


def test_the_least_squares_control_finds_a_known_map() -> None:
    rng = np.random.default_rng(0)
    known = rng.standard_normal((6, 10)).astype(np.float32)
    expert = rng.standard_normal((300, 10)).astype(np.float32) + 5
    target = expert @ known.T + 3
    np.testing.assert_allclose(expertsteer.least_squares(expert, target, 1e-6), known, atol=1e-3)
    shrunk = expertsteer.least_squares(expert, target, 300.0)
    x, y = expert - expert.mean(0), target - target.mean(0)
    closed = y.T @ x @ np.linalg.inv(x.T @ x + 300.0 * np.trace(x.T @ x) / 10 * np.eye(10))
    np.testing.assert_allclose(shrunk, closed, atol=1e-4)


def test_with_least_squares_the_vector_is_the_mapped_direction_at_the_same_length() -> None:
    positive, negative, _, _ = models()
    known = np.random.default_rng(1).standard_normal((6, 10)).astype(np.float32)
    target = np.stack([positive[:, 0] @ known.T, positive[:, 1] @ known.T], axis=1)
    literal, mapped = (
        expertsteer.fit(positive, negative, target, Config(pairs=1, alignment=alignment, ridge=1e-6, rfm=QUICK))
        for alignment in ("auto_encoder", "least_squares")
    )
    ((layer, vector),) = mapped.vectors.items()
    (pair,) = mapped.pairs
    mapping = expertsteer.least_squares(positive[:, pair.expert], target[:, pair.target], 1e-6)
    expected = mapping @ rfm.fit(positive[:, pair.expert], negative[:, pair.expert], QUICK).direction
    assert vector @ expected / np.linalg.norm(vector) / np.linalg.norm(expected) == pytest.approx(1, abs=1e-4)
    assert np.linalg.norm(vector) == pytest.approx(np.linalg.norm(literal.vectors[layer]), rel=1e-5)


def test_random_vectors_are_as_long_and_at_the_same_layers() -> None:
    vectors = {4: np.arange(8, dtype=np.float32), 2: np.ones(8, np.float32)}
    drawn = expertsteer.random_vectors(vectors, 0)
    assert drawn.keys() == vectors.keys()
    for layer, vector in vectors.items():
        assert np.linalg.norm(drawn[layer]) == pytest.approx(np.linalg.norm(vector), rel=1e-6)
    reordered = expertsteer.random_vectors(dict(sorted(vectors.items())), 0)
    np.testing.assert_array_equal(reordered[4], drawn[4])
    assert not np.array_equal(expertsteer.random_vectors(vectors, 1)[4], drawn[4])


def test_a_model_as_its_own_expert_is_steered_along_its_own_directions() -> None:
    positive, negative, _, planted = models(expert=40)
    found = expertsteer.self_expert(positive, negative, Config(pairs=1, rfm=QUICK))
    assert found.mutual_information.shape == (3, 3)
    (pair,) = found.pairs
    vector = found.vectors[pair.target]
    assert vector @ planted[pair.expert] > 0.8 and np.linalg.norm(vector) == pytest.approx(1, abs=1e-5)


def test_labels_that_are_swapped_turn_the_vector_round() -> None:
    positive, negative, target, _ = models(target=10)
    forward = expertsteer.fit(positive, negative, target, Config(pairs=6, rfm=QUICK))
    back = expertsteer.fit(negative, positive, target, Config(pairs=6, rfm=QUICK))
    assert all(forward.vectors[layer] @ back.vectors[layer] < 0 for layer in forward.vectors)


def test_pairs_with_the_same_information_are_taken_in_order() -> None:
    assert expertsteer._least(np.array([[0.2, 0.1], [0.1, 0.3]], np.float32), 2) == (
        LayerPair(0, 1, pytest.approx(0.1)),
        LayerPair(1, 0, pytest.approx(0.1)),
    )


def test_what_does_not_fit_together_is_refused() -> None:
    positive, negative, target, _ = models()
    with pytest.raises(ValueError, match="target's states"):
        expertsteer.fit(positive, negative, target[:-1], Config(rfm=QUICK))
    with pytest.raises(ValueError, match="between 1 and the 6"):
        expertsteer.fit(positive, negative, target, Config(pairs=7, rfm=QUICK))
    with pytest.raises(ValueError, match="at least 10 texts"):
        expertsteer.auto_encoder(positive[:9, 0], 4, 0)
    with pytest.raises(ValueError, match="all the same"):
        expertsteer.auto_encoder(np.ones((20, 4), np.float32), 4, 0)
    with pytest.raises(ValueError, match="more than 3"):
        expertsteer.mutual_information(np.arange(3.0), np.arange(3.0))
