"""Each kind and op against its own definition, in numpy: the edits it becomes must do to x what it promises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from methods.kinds import (
    UNBOUNDED,
    Bounds,
    Feature,
    OptionError,
    Part,
    Recipe,
    linear_map,
    neuron_set,
    sae,
    steering_vector,
)
from server.engine.edits import Edit, Function, Program

WIDTH, FEATURES = 12, 7
DIGEST = "sha256:" + "a" * 64
RNG = np.random.default_rng(0)


def act(name: str, z: np.ndarray, threshold: np.ndarray) -> np.ndarray:
    return {"identity": z, "relu": np.maximum(z, 0), "jumprelu": np.where(z > threshold, z, 0)}[name]


def run(parts: tuple[Part, ...], tensors: dict[Any, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The edits, by the table in server/engine/edits.py, in float64."""
    x = x.astype(np.float64)
    for part in parts:
        assert part.recipe is not None
        rows = part.recipe.rows
        chosen = {role: tensor if rows is None else tensor[list(rows)] for role, tensor in tensors.items()}
        o = {k: v.astype(np.float64) for k, v in part.recipe.build(chosen, WIDTH).items()}
        s = part.strength
        if part.opcode == "add":
            x = x + s * o["vector"]
        elif part.opcode == "add_norm":
            x = x + s * np.linalg.norm(x) * o["vector"] / np.linalg.norm(o["vector"])
        elif part.opcode == "scale":
            x = x * (1 + s * o["mask"])
        elif part.opcode == "map":
            x = x + s * (o["matrix"] @ x if "matrix" in o else o["left"] @ (o["right"] @ x))
        elif part.opcode == "set":
            x = o["vector"]
        else:
            assert part.opcode == "rank" and part.function is not None
            f = part.function
            zeros = np.zeros(len(o["encoder"]))
            c = act(f.activation, o["encoder"] @ x + o.get("bias", zeros), o.get("threshold", zeros))
            if f.clamps:
                low = -np.inf if f.low is None else np.array(f.low)
                high = np.inf if f.high is None else np.array(f.high)
                c = np.clip(c, low, high) - c
            x = x + s * c @ o["decoder"]
    return x


def vector() -> dict[Any, np.ndarray]:
    return {None: RNG.standard_normal(WIDTH).astype(np.float32)}


def dictionary(threshold: float = 0.3) -> dict[Any, np.ndarray]:
    """An SAE; its decoder's bias stays out of it, as it must not matter."""
    return {
        "encoder": RNG.standard_normal((FEATURES, WIDTH)).astype(np.float32),
        "encoder_bias": RNG.standard_normal(FEATURES).astype(np.float32),
        "threshold": np.full(FEATURES, threshold, np.float32),
        "decoder": RNG.standard_normal((FEATURES, WIDTH)).astype(np.float32),
    }


def encode(tensors: dict[Any, np.ndarray], activation: str, x: np.ndarray) -> np.ndarray:
    return act(activation, tensors["encoder"] @ x + tensors["encoder_bias"], tensors["threshold"])


def activation_vectors(count: int = 5) -> list[np.ndarray]:
    return list(2 * RNG.standard_normal((count, WIDTH)))


@pytest.mark.parametrize("x", activation_vectors())
def test_ablation_leaves_nothing_along_the_vector_and_the_rest_as_it_was(x: np.ndarray) -> None:
    tensors = vector()
    unit = tensors[None] / np.linalg.norm(tensors[None])
    after = run(steering_vector("ablate", 1.0, None), tensors, x)
    assert after @ unit == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(after - (after @ unit) * unit, x - (x @ unit) * unit, atol=1e-6)
    half = run(steering_vector("ablate", 0.5, None), tensors, x)
    assert half @ unit == pytest.approx(x @ unit / 2, abs=1e-6)


@pytest.mark.parametrize("bounds", [Bounds(-0.5, 0.5), Bounds(None, 0.2), Bounds(0.1, None), Bounds(3.0, 3.0)])
@pytest.mark.parametrize("x", activation_vectors())
def test_clamp_puts_the_projection_between_its_bounds(x: np.ndarray, bounds: Bounds) -> None:
    tensors = vector()
    unit = tensors[None] / np.linalg.norm(tensors[None])
    after = run(steering_vector("clamp", 1.0, bounds), tensors, x)
    low = -np.inf if bounds.low is None else bounds.low
    high = np.inf if bounds.high is None else bounds.high
    np.testing.assert_allclose(after, x + (np.clip(x @ unit, low, high) - x @ unit) * unit, atol=1e-5)


def test_add_add_norm_set_scale_and_map_are_their_formulas() -> None:
    x, tensors = activation_vectors(1)[0], vector()
    v = tensors[None].astype(np.float64)
    np.testing.assert_allclose(run(steering_vector("add", 2.0, None), tensors, x), x + 2 * v)
    grown = x + 0.1 * np.linalg.norm(x) * v / np.linalg.norm(v)
    np.testing.assert_allclose(run(steering_vector("add_norm", 0.1, None), tensors, x), grown)
    np.testing.assert_array_equal(run(steering_vector("set", 1.0, None), tensors, x), v)
    scaled = run(neuron_set(-1.0), {None: np.array([1, 4])}, x)
    assert scaled[[1, 4]].tolist() == [0, 0] and np.delete(scaled, [1, 4]).tolist() == np.delete(x, [1, 4]).tolist()
    weighted = run(neuron_set(0.5), {None: np.array([1, 4]), "weights": np.array([2.0, -1.0])}, x)
    assert weighted[[1, 4]].tolist() == [2 * x[1], 0.5 * x[4]]
    matrix = RNG.standard_normal((WIDTH, WIDTH))
    np.testing.assert_allclose(run(linear_map(0.3, [2], False), {"matrix": matrix}, x), x + 0.3 * matrix @ x)
    biased = run(linear_map(0.3, [2], True), {"matrix": matrix, "bias": v}, x)
    np.testing.assert_allclose(biased, x + 0.3 * (matrix @ x + v))
    left, right = RNG.standard_normal((WIDTH, 3)), RNG.standard_normal((3, WIDTH))
    factored = run(linear_map(0.3, [2], False), {"left": left, "right": right}, x)
    np.testing.assert_allclose(factored, run(linear_map(0.3, [2], False), {"matrix": left @ right}, x))


def test_an_empty_set_of_neurons_changes_nothing() -> None:
    x = activation_vectors(1)[0]
    np.testing.assert_array_equal(run(neuron_set(5.0), {None: np.array([], np.int64)}, x), x)


@pytest.mark.parametrize("activation", ["identity", "relu", "jumprelu"])
@pytest.mark.parametrize("x", activation_vectors())
def test_features_edited_as_edits_equal_encode_edit_decode_plus_the_error(activation: Any, x: np.ndarray) -> None:
    tensors = dictionary()
    features = [
        Feature(2, "clamp", bounds=Bounds(4.0, 4.0)),
        Feature(0, "scale", 1.5),
        Feature(5, "ablate"),
        Feature(1, "clamp", bounds=Bounds(None, 0.4)),
        Feature(6, "add", -0.7),
        Feature(3, "add", 2.0),
    ]
    before = encode(tensors, activation, x)
    wanted = before.copy()
    wanted[2], wanted[0], wanted[5], wanted[1] = 4.0, 2.5 * before[0], 0.0, min(before[1], 0.4)
    wanted[6] -= 0.7
    wanted[3] += 2.0
    decoder_bias = RNG.standard_normal(WIDTH)
    error = x - (before @ tensors["decoder"] + decoder_bias)
    expected = wanted @ tensors["decoder"] + decoder_bias + error
    parts = sae(1.0, 3, activation, features)
    assert [part.opcode for part in parts] == ["rank", "add"]
    np.testing.assert_allclose(run(parts, tensors, x), expected, atol=1e-5)
    halfway = run(sae(0.5, 3, activation, features), tensors, x)
    np.testing.assert_allclose(halfway, (x + expected) / 2, atol=1e-5)


def test_a_sweep_over_the_value_of_one_feature_needs_one_operand() -> None:
    for op in ("scale", "add"):
        keys = {sae(1.0, 0, "relu", [Feature(4, op, value)])[0].recipe for value in (0.5, 1.0, -3.0)}
        assert len(keys) == 1
    clamps = [sae(1.0, 0, "relu", [Feature(4, "clamp", bounds=Bounds(value, value))])[0] for value in (1.0, 2.0)]
    assert clamps[0].recipe == clamps[1].recipe and clamps[0].function != clamps[1].function


def test_an_open_bound_beside_a_closed_one_is_a_number_that_json_can_hold() -> None:
    (part,) = sae(1.0, 0, "relu", [Feature(0, "ablate"), Feature(1, "clamp", bounds=Bounds(2.0, None))])
    assert part.function == Function("relu", (0.0, 2.0), (0.0, UNBOUNDED))
    assert part.recipe is not None
    program = Program((Edit("rank", part.recipe.key(DIGEST), (0,), function=part.function),))
    assert Program.from_wire(program.wire) == program


def test_a_bound_that_no_row_has_is_left_out() -> None:
    assert steering_vector("clamp", 1.0, Bounds(None, 2.0))[0].function == Function("identity", None, (2.0,))


def test_keys_differ_exactly_where_the_numbers_do() -> None:
    recipes = [
        Recipe("vector"),
        Recipe("projection"),
        Recipe("map", (1,)),
        Recipe("map", (1, 2)),
        Recipe("features", (1,), (3,)),
        Recipe("features", (2,), (3,)),
        Recipe("features", (1,), (4,)),
        Recipe("features", (1,), (3, 4)),
        Recipe("features", (1,), (3, 4), (1.0, 2.0)),
        Recipe("sum", (1,), (3, 4), (1.0, 2.0)),
    ]
    assert len({recipe.key(DIGEST) for recipe in recipes}) == len(recipes)
    assert Recipe("sum", (1,), (3,)).key(DIGEST) == Recipe("sum", (1,), (3,)).key(DIGEST)
    assert all(recipe.key(DIGEST) != recipe.key("sha256:" + "b" * 64) for recipe in recipes)


@pytest.mark.parametrize(
    ("bounds", "field"),
    [((None, None, None), "value"), ((1.0, None, 1.0), "value"), ((2.0, 1.0, None), "min")],
)
def test_bounds_that_contradict_each_other_are_refused(bounds: tuple[Any, Any, Any], field: str) -> None:
    with pytest.raises(OptionError) as error:
        Bounds.of(*bounds)
    assert error.value.field == field


def test_a_feature_named_twice_is_refused() -> None:
    with pytest.raises(OptionError, match="twice") as error:
        sae(1.0, 0, "relu", [Feature(1, "ablate"), Feature(2, "ablate"), Feature(1, "add", 1.0)])
    assert error.value.field == "features.2.index"
