from __future__ import annotations

import numpy as np

from methods.sae import Sae
from methods.sae_examples import TopExamples

WIDTH = 6


def identity_sae() -> Sae:
    """Feature k is the positive part of coordinate k; the last one never fires."""
    eye, zero = np.eye(WIDTH, dtype=np.float32), np.zeros(WIDTH, np.float32)
    bias = np.where(np.arange(WIDTH) == WIDTH - 1, -1e9, 0).astype(np.float32)
    return Sae("relu", eye, bias, eye, zero)


def test_the_strongest_texts_of_each_feature_are_kept_one_place_a_text() -> None:
    rng = np.random.default_rng(0)
    texts = [rng.standard_normal((tokens, WIDTH)).astype(np.float32) for tokens in (5, 1, 0, 7, 3, 9)]
    top = TopExamples(identity_sae(), 3)
    for rows in texts:
        top.add(rows)
    for feature in range(WIDTH - 1):
        best = [
            (number, int(rows[:, feature].argmax()), float(rows[:, feature].max()))
            for number, rows in enumerate(texts)
            if len(rows) and rows[:, feature].max() > 0
        ]
        assert top.of(feature) == sorted(best, key=lambda each: -each[2])[:3]
    assert top.of(WIDTH - 1) == []


def test_of_equal_texts_the_first_stays() -> None:
    top = TopExamples(identity_sae(), 2)
    for _ in range(4):
        top.add(np.ones((2, WIDTH), np.float32))
    assert top.of(0) == [(0, 0, 1.0), (1, 0, 1.0)]
