from __future__ import annotations

import numpy as np
import pytest

from methods import caa

PAIRS, LAYERS, HIDDEN = 40, 3, 16


def activations(seed: int = 0) -> tuple[caa.Array, caa.Array, caa.Array]:
    """Pairs that differ by a planted direction [layers, hidden], under noise of their own."""
    rng = np.random.default_rng(seed)
    planted = rng.standard_normal((LAYERS, HIDDEN)).astype(np.float32)
    base = rng.standard_normal((PAIRS, LAYERS, HIDDEN)).astype(np.float32)
    noise = 0.1 * rng.standard_normal((PAIRS, LAYERS, HIDDEN)).astype(np.float32)
    size = rng.uniform(0.5, 1.5, (PAIRS, 1, 1)).astype(np.float32)
    return base + size * planted + noise, base, planted


@pytest.mark.parametrize("variant", ["mean_difference", "pca"])
def test_a_planted_direction_is_recovered_with_its_sign_and_length(variant: caa.Variant) -> None:
    positive, negative, planted = activations()
    fitted = caa.fit(positive, negative, caa.Config(variant=variant))
    for found, wanted in zip(fitted.vectors, planted, strict=True):
        cosine = found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted)
        assert cosine > 0.99
        assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(wanted), rel=0.15)
    assert (fitted.agreement == 1).all()


@pytest.mark.parametrize("variant", ["mean_difference", "pca"])
def test_swapping_the_sides_turns_the_vector_round(variant: caa.Variant) -> None:
    positive, negative, _ = activations()
    config = caa.Config(variant=variant)
    forward, back = caa.fit(positive, negative, config), caa.fit(negative, positive, config)
    np.testing.assert_allclose(forward.vectors, -back.vectors, atol=1e-4)


def test_agreement_is_near_chance_where_the_pairs_do_not_differ() -> None:
    rng = np.random.default_rng(0)
    both = rng.standard_normal((2, 400, 1, HIDDEN)).astype(np.float32)
    assert 0.35 < caa.fit(both[0], both[1], caa.Config()).agreement[0] < 0.65


def test_the_mean_difference_is_the_formula() -> None:
    positive, negative, _ = activations()
    np.testing.assert_allclose(
        caa.fit(positive, negative, caa.Config()).vectors, (positive - negative).mean(0), rtol=1e-6
    )


def test_default_layers_are_the_middle_third_unless_given() -> None:
    assert caa.middle_third(30) == tuple(range(10, 20))
    assert caa.middle_third(1) == (0,)
    positive, negative, _ = activations()
    assert caa.fit(positive, negative, caa.Config(default_layers=(2,))).default_layers == (2,)
    with pytest.raises(ValueError, match=r"\[3\] are outside"):
        caa.fit(positive, negative, caa.Config(default_layers=(3,)))


def test_too_few_pairs_and_unequal_shapes_are_refused() -> None:
    positive, negative, _ = activations()
    with pytest.raises(ValueError, match="at least 2 pairs"):
        caa.fit(positive[:1], negative[:1], caa.Config())
    with pytest.raises(ValueError, match="equal shapes"):
        caa.fit(positive, negative[:-1], caa.Config())
