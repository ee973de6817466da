from __future__ import annotations

import math

import numpy as np
import pytest

from methods.gated_mlp import GatedMlp, disagreement

HIDDEN, NEURONS, EPSILON = 6, 9, 1e-3


def weights(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = (NEURONS, HIDDEN), (NEURONS, HIDDEN), (HIDDEN,), (HIDDEN,)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


def act(name: str, value: float) -> float:
    if name == "silu":
        return value / (1 + math.exp(-value))
    return 0.5 * value * (1 + math.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def norm(x: list[float], weight: np.ndarray) -> list[float]:
    size = math.sqrt(sum(value * value for value in x) / len(x) + EPSILON)
    return [value / size * float(w) for value, w in zip(x, weight, strict=True)]


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("sandwiched", [False, True])
def test_gates_and_what_is_written_are_the_formula_number_by_number(activation: str, sandwiched: bool) -> None:
    gate, up, first, second = weights(0)
    rng = np.random.default_rng(1)
    stream, attention = (3 * rng.standard_normal((2, 4, HIDDEN))).astype(np.float32)
    mlp = GatedMlp(gate, up, np.ones(NEURONS), first if sandwiched else None, second, EPSILON, activation)  # type: ignore[arg-type]
    found = mlp(stream, attention)
    for row in range(4):
        returned = attention[row].tolist()
        if sandwiched:
            returned = norm(returned, first)
        x = norm([float(h) + a for h, a in zip(stream[row], returned, strict=True)], second)
        for j in range(NEURONS):
            opened = act(activation, sum(float(g) * value for g, value in zip(gate[j], x, strict=True)))
            written = opened * sum(float(u) * value for u, value in zip(up[j], x, strict=True))
            assert found.gates[row, j] == pytest.approx(opened, abs=1e-5)
            assert found.written[row, j] == pytest.approx(written, abs=1e-4)


def test_the_sign_of_a_gate_is_not_that_of_what_is_written() -> None:
    gate, up, _, second = weights(0)
    rng = np.random.default_rng(1)
    stream, attention = rng.standard_normal((2, 50, HIDDEN)).astype(np.float32)
    found = GatedMlp(gate, up, np.ones(NEURONS), None, second, EPSILON, "silu")(stream, attention)
    assert 0.3 < ((found.gates > 0) == (found.written > 0)).mean() < 0.7


def test_the_largest_states_make_no_warning() -> None:
    gate, up, _, _ = weights(0)
    huge = np.full((1, HIDDEN), 1e4, np.float32)
    found = GatedMlp(gate, up, np.ones(NEURONS), None, None, EPSILON, "silu")(huge, huge)
    assert np.isfinite(found.written).all()


def test_disagreement_is_relative_and_knows_a_model_that_is_built_otherwise() -> None:
    captured = np.random.default_rng(0).standard_normal((5, NEURONS)).astype(np.float32)
    assert disagreement(captured, captured) == 0
    assert disagreement(captured * np.float32(1.02), captured) == pytest.approx(0.02, rel=1e-3)
    assert disagreement(captured[::-1], captured) > 0.5
