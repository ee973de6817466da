from __future__ import annotations

import numpy as np
import pytest

from methods import sadi

PAIRS, LAYERS, HEADS, PER_HEAD = 40, 4, 6, 8
WIDTH = HEADS * PER_HEAD


def activations(shift: np.ndarray, noise: float = 0.1, seed: int = 0) -> tuple[sadi.Array, sadi.Array]:
    """Sides [pairs, layers, width] that differ by `shift` [layers, width], under noise of their own."""
    rng = np.random.default_rng(seed)
    negative = rng.standard_normal((PAIRS, LAYERS, WIDTH))
    positive = negative + shift + noise * rng.standard_normal(negative.shape)
    return positive.astype(np.float32), negative.astype(np.float32)


def released(
    positive: np.ndarray, negative: np.ndarray, heads: int | None, top_k: int
) -> tuple[set[tuple[int, int]], np.ndarray]:
    """The released code's arithmetic, written from the specification: differences of float32 arrays, for heads of the
    averages over their dimensions, averaged over the pairs and flattened over the layers; the top_k largest, signed.
    """
    if heads is not None:
        positive = positive.reshape(*positive.shape[:2], heads, -1).mean(-1)
        negative = negative.reshape(*negative.shape[:2], heads, -1).mean(-1)
    total = np.zeros(positive.shape[1:])
    for p, n in zip(positive, negative, strict=True):
        total += p - n
    flat = (total / len(positive)).flatten()
    best = sorted(range(flat.size), key=lambda index: flat[index])[-top_k:]
    return {(index // positive.shape[2], index % positive.shape[2]) for index in best}, flat


@pytest.mark.parametrize("component", ["neurons", "hidden", "mlp"])
def test_planted_elements_are_found_over_all_layers_best_first(component: sadi.Component) -> None:
    shift = np.zeros((LAYERS, WIDTH))
    shift[0, 7], shift[3, 40], shift[3, 2], shift[1, 9] = 3.0, 2.0, 1.0, -5.0
    fitted = sadi.fit(*activations(shift), sadi.Config(component, top_k=3), HEADS)
    assert fitted.selected == ((0, 7), (3, 40), (3, 2))
    assert {layer: chosen.tolist() for layer, chosen in fitted.indices.items()} == {0: [7], 3: [2, 40]}
    assert fitted.stability == 1
    largest = sadi.fit(*activations(shift), sadi.Config(component, "abs_top", 3), HEADS)
    assert largest.selected == ((1, 9), (0, 7), (3, 40))


def test_planted_heads_are_found_whole_though_single_dimensions_of_others_differ_more() -> None:
    shift = np.zeros((LAYERS, WIDTH))
    shift[2, 3 * PER_HEAD : 4 * PER_HEAD] = 1.0
    shift[0, :PER_HEAD] = 0.8
    shift[1, 5], shift[1, 6] = 6.0, -6.0  # cancels in the head's average
    fitted = sadi.fit(*activations(shift), sadi.Config(top_k=2), HEADS)
    assert fitted.selected == ((2, 3), (0, 0))
    assert fitted.indices[2].tolist() == list(range(24, 32))
    assert fitted.indices[0].tolist() == list(range(8))


@pytest.mark.parametrize(("component", "heads"), [("heads", HEADS), ("neurons", None), ("mlp", None)])
@pytest.mark.parametrize("seed", range(3))
def test_the_fit_equals_the_released_arithmetic(component: sadi.Component, heads: int | None, seed: int) -> None:
    shift = np.random.default_rng(seed).standard_normal((LAYERS, WIDTH))
    positive, negative = activations(shift, noise=1.0, seed=seed)
    fitted = sadi.fit(positive, negative, sadi.Config(component, top_k=9), HEADS)
    selected, difference = released(positive, negative, heads, 9)
    assert set(fitted.selected) == selected
    np.testing.assert_allclose(fitted.scores.flatten(), difference, atol=1e-6)


def test_the_fixed_vector_is_the_mean_difference_on_the_mask_and_zero_elsewhere() -> None:
    shift = np.zeros((LAYERS, WIDTH))
    shift[2, :PER_HEAD] = np.arange(1, PER_HEAD + 1)
    positive, negative = activations(shift)
    fitted = sadi.fit(positive, negative, sadi.Config(top_k=1, form="fixed"), HEADS)
    (layer,) = fitted.vectors
    assert layer == 2
    np.testing.assert_allclose(fitted.vectors[2][:PER_HEAD], (positive - negative).mean(0)[2, :PER_HEAD], atol=1e-6)
    assert not fitted.vectors[2][PER_HEAD:].any()


def test_stability_is_low_where_the_sides_differ_by_chance() -> None:
    positive, negative = activations(np.zeros((LAYERS, WIDTH)), noise=1.0)
    assert sadi.fit(positive, negative, sadi.Config("neurons", top_k=10), HEADS).stability < 0.5


def test_equal_scores_are_taken_in_order() -> None:
    assert sadi.select(np.ones((2, 3)), 4, "signed_top") == ((0, 0), (0, 1), (0, 2), (1, 0))


def test_the_text_ends_with_the_answer() -> None:
    assert sadi.text(" Is it? \n", " yes\n") == "Is it? yes"
    assert sadi.text("", "yes") == "yes"


def test_what_nothing_can_be_fitted_from_is_refused() -> None:
    positive, negative = activations(np.ones((LAYERS, WIDTH)))
    with pytest.raises(ValueError, match="at least 2 pairs"):
        sadi.fit(positive[:1], negative[:1], sadi.Config(), HEADS)
    with pytest.raises(ValueError, match="equal shapes"):
        sadi.fit(positive, negative[:-1], sadi.Config(), HEADS)
    with pytest.raises(ValueError, match="top_k 25 must be from 1 to the 24 heads"):
        sadi.fit(positive, negative, sadi.Config(top_k=25), HEADS)
    with pytest.raises(ValueError, match="don't differ at"):
        sadi.fit(positive, positive, sadi.Config(), HEADS)
