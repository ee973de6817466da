from __future__ import annotations

import numpy as np
import pytest

from methods import kinds, lf_steering
from methods.kinds import Part, Recipe
from methods.lf_steering import Features
from methods.sae import Activation, Sae, calibrated
from server.engine.edits import Function
from tests.methods.test_kinds import run as run_edits

WIDTH, FEATURES = 24, 40


def dictionary(activation: Activation = "jumprelu") -> Sae:
    """Unit rows that encode and decode, in a space with room for few: pairs of them interfere."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((FEATURES, WIDTH))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    bias = rng.standard_normal(WIDTH).astype(np.float32)
    return Sae(
        activation,
        rows,
        -rows @ bias,
        rows,
        bias,
        threshold=np.full(FEATURES, 0.7, np.float32) if activation == "jumprelu" else None,
        k=5 if activation == "topk" else None,
    )


def tokens(count: int = 30, seed: int = 1) -> np.ndarray:
    return (2 * np.random.default_rng(seed).standard_normal((count, WIDTH))).astype(np.float32)


def test_features_that_pairs_differ_in_are_selected_with_their_mean_change() -> None:
    """An orthogonal dictionary, and pairs that differ in three of its features."""
    eye = np.eye(WIDTH, dtype=np.float32)
    zero = np.zeros(WIDTH, np.float32)
    sae = Sae("jumprelu", eye, zero, eye, zero, threshold=np.full(WIDTH, 0.1, np.float32))
    wrong = np.abs(tokens(50)) + 1
    right = wrong.copy()
    right[:, [3, 8, 20]] += np.array([0.5, 2.0, 1.0], np.float32)
    found = lf_steering.select(sae, right, wrong)
    assert found.indices.tolist() == [8, 20, 3]
    np.testing.assert_allclose(found.gains, [2.0, 1.0, 0.5], rtol=1e-5)
    assert lf_steering.select(sae, right, wrong, threshold=0.6).indices.tolist() == [8, 20]
    assert lf_steering.select(sae, right, wrong, most=1).indices.tolist() == [8]
    assert lf_steering.select(sae, right, right).indices.tolist() == []


@pytest.mark.parametrize("activation", ["topk", "jumprelu", "relu"])
def test_both_forms_are_the_formula_token_by_token(activation: Activation) -> None:
    """Written out from the paper: encode, amplify the key features that fire, decode."""
    sae, x = dictionary(activation), tokens()
    features = Features(np.array([4, 17, 30]), np.array([0.5, 0.25, 1.5], np.float32))
    fired = 0
    for row, replaced, moved in zip(
        x, lf_steering.literal(sae, x, features, 20), lf_steering.delta(sae, x, features, 20), strict=True
    ):
        z = [float(sae.encoder[i].astype(np.float64) @ (row - sae.decoder_bias)) for i in range(FEATURES)]
        top = sorted(range(FEATURES), key=lambda i: -z[i])[:5]
        floor = 0.7 if activation == "jumprelu" else 0.0
        a = [v if v > floor and (activation != "topk" or i in top) else 0.0 for i, v in enumerate(z)]
        change = {i: 20 * g for i, g in zip(features.indices, features.gains, strict=True) if a[i] != 0}
        fired += len(change)
        decoded = sae.decoder_bias + sum((a[i] + change.get(i, 0)) * sae.decoder[i] for i in range(FEATURES))
        np.testing.assert_allclose(replaced, decoded, atol=1e-4)
        expected = row + sum((c * sae.decoder[i] for i, c in change.items()), np.zeros(WIDTH))
        np.testing.assert_allclose(moved, expected, atol=1e-4)
    assert 0 < fired < 3 * len(x)


def as_rank_edit(rows: Sae, x: np.ndarray, strength: float) -> np.ndarray:
    """x after the `rank` edit over all rows, by the definition of the edits."""
    tensors = {"encoder": rows.encoder, "encoder_bias": rows.encoder_bias, "decoder": rows.decoder}
    part = Part("rank", Recipe("features"), strength, Function("jumprelu"))
    return np.stack([run_edits((part,), {**tensors, "threshold": rows.threshold}, row) for row in x])


@pytest.mark.parametrize("alpha", [0.0, 3.0, 20.0])
@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_both_forms_are_one_rank_edit(activation: Activation, alpha: float) -> None:
    sae, x = dictionary(activation), tokens()
    features = Features(np.array([4, 17, 30]), np.array([0.5, 0.25, 1.5], np.float32))
    delta = as_rank_edit(lf_steering.delta_rows(sae, features), x, alpha)
    np.testing.assert_allclose(delta, lf_steering.delta(sae, x, features, alpha), atol=1e-4)
    literal = as_rank_edit(lf_steering.literal_rows(sae, features, alpha), x, 1.0)
    np.testing.assert_allclose(literal, lf_steering.literal(sae, x, features, alpha), atol=1e-4)


def test_all_rows_scaled_by_one_as_a_request_says_it_is_delta() -> None:
    sae, x = dictionary(), tokens()
    features = Features(np.array([4, 17, 30]), np.array([0.5, 0.25, 1.5], np.float32))
    rows = lf_steering.delta_rows(sae, features)
    parts = kinds.sae(3.0, 0, "jumprelu", [kinds.Feature(index, "scale", 1.0) for index in range(len(rows.encoder))])
    tensors = {"encoder": rows.encoder, "encoder_bias": rows.encoder_bias, "decoder": rows.decoder}
    served = [run_edits(parts, {**tensors, "threshold": rows.threshold}, row) for row in x]
    np.testing.assert_allclose(served, lf_steering.delta(sae, x, features, 3.0), atol=1e-4)


def test_without_features_delta_is_the_identity_and_literal_is_the_reconstruction() -> None:
    sae, x = dictionary(), tokens()
    none = Features(np.array([], np.int64), np.array([], np.float32))
    np.testing.assert_array_equal(lf_steering.delta(sae, x, none, 20), x)
    np.testing.assert_array_equal(lf_steering.literal(sae, x, none, 20), sae.decode(sae.encode(x)))
    replaced = as_rank_edit(lf_steering.literal_rows(sae, none, 20), x, 1.0)
    np.testing.assert_allclose(replaced, sae.decode(sae.encode(x)), atol=1e-4)
    with pytest.raises(ValueError, match="lower it"):
        lf_steering.delta_rows(sae, none)


def test_a_topk_must_be_calibrated_before_it_is_an_edit() -> None:
    sae, x = dictionary("topk"), tokens(2000)
    features = Features(np.array([4, 17]), np.array([0.5, 0.25], np.float32))
    for make in (
        lambda each: lf_steering.delta_rows(each, features),
        lambda each: lf_steering.literal_rows(each, features, 1.0),
    ):
        with pytest.raises(ValueError, match="calibrate"):
            make(sae)
        make(calibrated(sae, x))
    exact = sae.encode(x)[:, features.indices] > 0
    approximate = calibrated(sae, x).encode(x)[:, features.indices] > 0
    assert (exact == approximate).mean() > 0.9


def planted_pairs(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs [pairs, layers, hidden] whose agreement shows at layer 2, weakly at 1, and nowhere else."""
    rng = np.random.default_rng(seed)
    first, second = rng.standard_normal((2, 400, 4, 16)).astype(np.float32)
    consistent = rng.random(400) < 0.6
    first[:, 2, 3] += 3 * consistent
    second[:, 1, 5] += 1 * consistent
    return first, second, consistent


def test_the_layer_is_where_consistency_can_be_read() -> None:
    first, second, consistent = planted_pairs()
    found = lf_steering.locate(first, second, consistent)
    assert found.layer == 2
    assert found.accuracies[2] > 0.85 and found.accuracies[2] > found.accuracies[1] > found.accuracies[[0, 3]].max()
    assert found.accuracies[[0, 3]].max() < found.majority + 0.1
    assert 0.55 < found.majority < 0.65


def test_the_layer_is_judged_on_pairs_that_took_no_part() -> None:
    """Pure noise in more dimensions than pairs is separable, and must still look like chance."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((2, 300, 1, 400)).astype(np.float32)
    consistent = np.arange(300) % 2 == 0
    assert lf_steering.locate(first, second, consistent).accuracies[0] < 0.68


def test_wrong_shapes_and_too_few_pairs_are_refused() -> None:
    first, second, consistent = planted_pairs()
    with pytest.raises(ValueError, match="need"):
        lf_steering.locate(first, second[:-1], consistent)
    with pytest.raises(ValueError, match="10 consistent"):
        lf_steering.locate(first[:12], second[:12], np.arange(12) < 11)
    with pytest.raises(ValueError, match="equal shapes"):
        lf_steering.select(dictionary(), tokens(3), tokens(4))
