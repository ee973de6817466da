from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from steering_store.errors import InvalidManifest, InvalidTensor
from steering_store.formats import reconstruction as module
from steering_store.formats.reconstruction import MIN_TOKENS, calibrated, check_reconstruction, features, reconstruction
from steering_store.formats.sae import Sae, folded

Array = np.ndarray[Any, np.dtype[np.float32]]
WIDTH, FEATURES = 32, 128
GENERATOR = np.random.default_rng(5)
USED = 8
DIRECTIONS = np.linalg.qr(GENERATOR.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)[:USED]


def sae() -> Sae:
    """Finds which of 8 orthogonal directions, in either sign, are in x; its other features are hardly ever active."""
    rows = np.tile(np.concatenate([DIRECTIONS, -DIRECTIONS]), (FEATURES // USED // 2, 1))
    bias = np.where(np.arange(FEATURES) < 2 * USED, -0.5, -100).astype(np.float32)
    middle = np.linspace(-3, 3, WIDTH, dtype=np.float32)
    return folded(Sae(rows, bias, rows, middle, "relu"), bias_is_subtracted=True)


def activations(tokens: int = 500) -> Array:
    generator = np.random.default_rng(6)
    f = generator.normal(0, 5, (tokens, USED)) * (generator.random((tokens, USED)) < 0.3)
    return (f @ DIRECTIONS + np.linspace(-3, 3, WIDTH) + generator.normal(0, 0.1, (tokens, WIDTH))).astype(np.float32)


def test_right_sae_reconstructs(monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations()
    measured = reconstruction(sae(), x)
    check_reconstruction(measured, sae())
    assert measured.fvu < 0.1 and 1 < measured.l0 < 4 and measured.tokens == 500
    acts = features(sae(), x)
    error = x - (acts @ sae().decoder + sae().decoder_bias)
    assert measured.fvu == pytest.approx(
        float(error.var(axis=0).sum() + (error.mean(axis=0) ** 2).sum()) / x.var(axis=0).sum(), rel=1e-4
    )
    assert measured.l0 == pytest.approx((acts > 0).sum(axis=1).mean())
    monkeypatch.setattr(module, "CHUNK_VALUES", 7 * FEATURES)
    assert reconstruction(sae(), x) == pytest.approx(measured)


WRONG: dict[str, Callable[[Sae, Array], tuple[Sae, Array]]] = {
    "another model": lambda s, x: (s, x @ np.linalg.qr(np.random.default_rng(9).normal(size=(WIDTH, WIDTH)))[0] * 9),
    "scale too large": lambda s, x: (s, x * np.float32(60)),
    "scale too small": lambda s, x: (s, x * np.float32(1e-3) + 100),
    "decoder reversed": lambda s, x: (dataclasses.replace(s, decoder=-s.decoder), x),
    "decoder's bias lost": lambda s, x: (dataclasses.replace(s, decoder_bias=s.decoder_bias * 0 - 40), x),
    "threshold lost": lambda s, x: (dataclasses.replace(s, encoder_bias=s.encoder_bias * 0 + 50), x),
    "never active": lambda s, x: (dataclasses.replace(s, encoder_bias=s.encoder_bias - 1000), x),
    "overflow": lambda s, x: (dataclasses.replace(s, decoder=s.decoder * np.float32(3e38)), x),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_wrong_sae_is_refused(wrong: Callable[[Sae, Array], tuple[Sae, Array]]) -> None:
    changed, x = wrong(sae(), activations())
    with np.errstate(all="ignore"):
        measured = reconstruction(changed, x.astype(np.float32))
    if not measured.fvu <= 1 or measured.l0 == 0 or measured.l0 > FEATURES / 2:
        with pytest.raises(InvalidTensor, match="doesn't fit the model"):
            check_reconstruction(measured, changed)
    else:
        pytest.fail(f"{measured} isn't absurd")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((MIN_TOKENS - 1, WIDTH), np.float32), "at least 64"),
        (np.ones((MIN_TOKENS, WIDTH + 1), np.float32), "at least 64"),
        (np.ones((MIN_TOKENS, WIDTH), np.float32), "don't vary"),
        (np.full((MIN_TOKENS, WIDTH), np.nan, np.float32), "NaN"),
    ],
)
def test_activations_that_say_nothing_are_refused(x: Array, message: str) -> None:
    with pytest.raises(InvalidTensor, match=message):
        reconstruction(sae(), x)


@pytest.mark.parametrize("k", [1, 4, 100])
def test_calibration_keeps_k_features_a_token_or_all_that_are_positive(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = activations()
    top = dataclasses.replace(sae(), activation=None, top_k=k)
    found, threshold = calibrated(top, x)
    positive = (x @ top.encoder.T + top.encoder_bias > 0).sum() / len(x)
    assert reconstruction(found, x).l0 == pytest.approx(min(k, positive), abs=0.01)
    assert (threshold > 0) == (k < positive)
    monkeypatch.setattr(module, "CHUNK_VALUES", 7 * FEATURES)
    assert calibrated(top, x)[1] == pytest.approx(threshold)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
def test_factor_that_cannot_be_is_refused(factor: float) -> None:
    with pytest.raises(InvalidManifest, match="norm_factor"):
        folded(sae(), factor=factor)
