from __future__ import annotations

import numpy as np
import pytest

from methods import caa, extractors
from methods.extractors import Config, Extractor

SAMPLES, LAYERS, HIDDEN = 60, 2, 10
ALL: list[Extractor] = ["mean_difference", "pca", "logistic", "rfm"]


def contrast(seed: int = 0) -> tuple[extractors.Array, extractors.Array, extractors.Array]:
    """Pairs that differ by a planted direction [layers, hidden] of length 2, of which layer 0's is weak."""
    rng = np.random.default_rng(seed)
    planted = rng.standard_normal((LAYERS, HIDDEN))
    planted *= np.array([[0.5], [4.0]]) / np.linalg.norm(planted, axis=1, keepdims=True)
    base = rng.standard_normal((SAMPLES, LAYERS, HIDDEN))
    noise = 0.3 * rng.standard_normal((SAMPLES, LAYERS, HIDDEN))
    return (base + planted + noise).astype(np.float32), base.astype(np.float32), planted.astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("extractor", ALL)
def test_a_planted_direction_is_found_with_its_sign_and_length(extractor: Extractor) -> None:
    positive, negative, planted = contrast()
    found = extractors.extract(positive, negative, Config(extractor))
    assert cosine(found.vectors[1], planted[1]) > 0.9
    assert np.linalg.norm(found.vectors[1]) == pytest.approx(4, rel=0.15)
    assert found.aucs[1] > 0.95 and found.correlations[1] > 0.8
    assert found.correlations[0] < found.correlations[1]


@pytest.mark.parametrize("extractor", ALL)
def test_swapping_the_sides_turns_the_vector_round(extractor: Extractor) -> None:
    positive, negative, _ = contrast()
    forward, back = (
        extractors.extract(*sides, Config(extractor)) for sides in ((positive, negative), (negative, positive))
    )
    assert cosine(forward.vectors[1], back.vectors[1]) < -0.99


@pytest.mark.parametrize("variant", ["mean_difference", "pca"])
def test_caa_is_the_same_extraction(variant: caa.Variant) -> None:
    positive, negative, _ = contrast()
    np.testing.assert_allclose(
        extractors.extract(positive, negative, Config(variant)).vectors,
        caa.fit(positive, negative, caa.Config(variant=variant)).vectors,
        atol=1e-5,
    )


def test_an_even_concept_is_found_by_rfm_alone_and_marked_as_not_steerable() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((500, 1, HIDDEN)).astype(np.float32)
    order = np.argsort(np.abs(x[:, 0, 3]))
    near, far = x[order[:250]], x[order[250:]]
    axis = np.eye(HIDDEN)[3]
    found = {name: extractors.extract(far, near, Config(name)) for name in ALL}
    alignment = {name: abs(cosine(each.vectors[0], axis)) for name, each in found.items()}
    assert alignment.pop("rfm") > 0.95
    assert max(alignment["mean_difference"], alignment["logistic"]) < 0.7
    assert found["rfm"].correlations[0] < extractors.STEERABLE


def test_the_probe_minimises_its_loss() -> None:
    positive, negative, _ = contrast()
    sides = positive[:, 0], negative[:, 0]
    weights, intercept = extractors.logistic(*sides, 0.01)
    samples = np.concatenate(sides).astype(np.float64)
    targets = np.repeat([1.0, -1.0], SAMPLES)
    scale = np.sqrt(((samples - samples.mean(0)) ** 2).mean())

    def loss(w: np.ndarray, c: float) -> float:
        return float(np.log1p(np.exp(-targets * (samples @ w + c))).mean() + 0.005 * (w * scale) @ (w * scale))

    best = loss(weights, intercept)
    assert loss(weights, intercept + 1e-3) > best and loss(weights, intercept - 1e-3) > best
    for step in np.random.default_rng(0).standard_normal((50, HIDDEN)):
        assert loss(weights + 1e-3 * step, intercept) > best


def test_a_large_penalty_makes_the_probe_the_mean_difference() -> None:
    positive, negative, _ = contrast()
    weights, _ = extractors.logistic(positive[:, 1], negative[:, 1], 1e4)
    assert cosine(weights, extractors.mean_difference(positive, negative)[1]) > 0.9999


def test_an_ablation_uses_the_vector_of_one_layer_at_all() -> None:
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    assert extractors.everywhere(vectors, 1).tolist() == [[2, 3]] * 3
    with pytest.raises(IndexError):
        extractors.everywhere(vectors, 3)


@pytest.mark.parametrize("above", [True, False])
def test_a_condition_is_the_layer_and_threshold_that_tell_the_sides_apart(above: bool) -> None:
    positive, negative, planted = contrast()
    chosen = extractors.condition(positive, negative, planted if above else -planted)
    assert (chosen.layer, chosen.above) == (1, above)
    assert chosen.held_out_f1 > 0.9
    sign = 1 if above else -1
    for samples, wanted in ((positive, True), (negative, False)):
        x = samples[:, 1]
        cosines = x @ (sign * planted[1]) / np.linalg.norm(x, axis=1) / np.linalg.norm(planted[1])
        opened = cosines > chosen.threshold if above else cosines < chosen.threshold
        assert (opened == wanted).mean() > 0.8


def test_the_f1_of_a_condition_is_the_best_of_all_thresholds() -> None:
    rng = np.random.default_rng(0)
    values, labels = rng.standard_normal(40).astype(np.float32), rng.random(40) < 0.4
    f1, cut = extractors._threshold(values, labels)

    def score(threshold: float) -> float:
        chosen = values > threshold
        true = (chosen & labels).sum()
        precision, recall = true / max(chosen.sum(), 1), true / labels.sum()
        return float(2 * precision * recall / (precision + recall)) if true else 0.0

    assert f1 == pytest.approx(max(score(value - 1e-6) for value in values))
    assert score(cut) == pytest.approx(f1)


def test_shapes_and_numbers_that_do_not_fit_are_refused() -> None:
    positive, negative, _ = contrast()
    with pytest.raises(ValueError, match=r"\[samples, layers, hidden\] twice"):
        extractors.extract(positive, negative[:, :1], Config())
    with pytest.raises(ValueError, match="as many positive as negative"):
        extractors.extract(positive, negative[:-1], Config("pca"))
    with pytest.raises(ValueError, match="at least 2"):
        extractors.extract(positive[:1], negative, Config())
    with pytest.raises(ValueError, match="at least 5"):
        extractors.condition(positive[:4], negative, positive[0])
