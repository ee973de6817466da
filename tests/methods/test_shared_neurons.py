from __future__ import annotations

import numpy as np
import pytest

from methods import shared_neurons
from methods.shared_neurons import CATEGORIES, Tally, categories

LANGUAGES, LAYERS, NEURONS, TOP = 4, 3, 40, 8
ALL, PARTIAL, SPECIFIC, NEVER = range(10), range(10, 25), range(25, 32), range(32, 40)
NORMS = np.random.default_rng(9).uniform(0.5, 2, (LAYERS, NEURONS)).astype(np.float32)


def planted(seed: int) -> np.ndarray:
    """Activations [languages, layers, neurons] with a known set of neurons in each category."""
    rng = np.random.default_rng(seed)
    sign = -np.ones((LANGUAGES, NEURONS), np.float32)
    sign[:, ALL] = 1
    sign[1:3, PARTIAL] = 1
    for j in SPECIFIC:
        sign[rng.integers(LANGUAGES), j] = 1
    return (rng.uniform(0.1, 1, (LANGUAGES, LAYERS, NEURONS)) * sign[:, None]).astype(np.float32)


def tally(*inputs: np.ndarray) -> Tally:
    made = Tally(NORMS, top=TOP)
    for each in inputs:
        made.add(each)
    return made


def test_planted_neurons_are_found_in_their_categories() -> None:
    found = tally(*map(planted, range(5)))
    for category, neurons in zip(CATEGORIES, (ALL, PARTIAL, SPECIFIC, NEVER), strict=True):
        assert [layer.tolist() for layer in found.members(category, 1.0)] == [list(neurons)] * LAYERS
    report = found.report()
    np.testing.assert_allclose(report.share[:, 0], [10 / 40, 15 / 40, 7 / 40, 8 / 40])
    np.testing.assert_allclose(report.repeating, report.share)
    assert report.active[0, 0] < report.active[1, 0] and report.inputs == 5


def by_hand(inputs: list[np.ndarray], theta: float) -> dict[str, np.ndarray]:
    """The released notebook's arithmetic as its specification has it, neuron by neuron."""
    share = np.zeros((4, LAYERS))
    top = np.zeros((4, LAYERS))
    contribution = np.zeros((4, LAYERS))
    scores: dict[tuple[int, int], list[float]] = {}
    for m in inputs:
        for layer in range(LAYERS):
            kind = {}
            for j in range(NEURONS):
                c = sum(1 for p in range(LANGUAGES) if m[p, layer, j] > theta)
                kind[j] = 3 if c == 0 else 2 if c == 1 else 0 if c == LANGUAGES else 1
                share[kind[j], layer] += 1 / NEURONS / len(inputs)
            for p in range(LANGUAGES):
                score = {j: abs(float(m[p, layer, j])) * float(NORMS[layer, j]) for j in range(NEURONS)}
                for j in sorted(score, key=lambda j: -score[j])[:TOP]:
                    top[kind[j], layer] += 1 / TOP / LANGUAGES / len(inputs)
                for j, value in score.items():
                    scores.setdefault((kind[j], layer), []).append(value)
                    contribution[kind[j], layer] += value / sum(score.values()) / LANGUAGES / len(inputs)
    table = np.full((3, 4, LAYERS), np.nan)
    for (category, layer), values in scores.items():
        table[:, category, layer] = np.mean(values), max(values), min(values)
    return {"share": share, "top_share": top, "contribution": contribution, "contribution_scores": table}


@pytest.mark.parametrize("theta", [0.0, 0.2, 0.5])
def test_the_report_is_the_notebooks_arithmetic(theta: float) -> None:
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((LANGUAGES, LAYERS, NEURONS)).astype(np.float32) for _ in range(6)]
    made = Tally(NORMS, threshold=theta, top=TOP)
    for each in inputs:
        made.add(each)
    for name, expected in by_hand(inputs, theta).items():
        np.testing.assert_allclose(getattr(made.report(), name), expected, atol=1e-6, err_msg=name)


def test_the_four_categories_partition_the_neurons_of_every_input() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        active = rng.random((LANGUAGES, LAYERS, NEURONS)) < rng.random()
        found = categories(active)
        count = active.sum(0)
        for index, wanted in enumerate((count == 4, (count > 1) & (count < 4), count == 1, count == 0)):
            np.testing.assert_array_equal(found == index, wanted)


def test_a_language_given_twice_shares_everything_with_itself() -> None:
    twice = np.repeat(planted(0)[:1], 3, axis=0)
    share = tally(twice).report().share
    assert share[1].max() == 0 and share[2].max() == 0 and share[0].min() > 0


def test_members_need_their_share_of_the_inputs() -> None:
    first, second = planted(0), planted(0)
    second[:, 0, 0] = -1
    made = tally(first, second)
    assert 0 in made.members("all_shared", 0.5)[0] and 0 not in made.members("all_shared", 0.6)[0]
    assert 0 in made.members("all_shared", 1.0)[1]


def test_the_range_over_inputs_is_reported() -> None:
    first, second = planted(0), planted(0)
    second[:, :, :5] = -1
    low, high = tally(first, second).report().share_range[:, 0, 0]
    assert (low, high) == (pytest.approx(5 / 40), pytest.approx(10 / 40))


def test_gates_decide_what_is_active_and_written_values_what_contributes() -> None:
    rng = np.random.default_rng(0)
    gates, up = rng.standard_normal((2, LANGUAGES, LAYERS, NEURONS)).astype(np.float32)
    made = Tally(NORMS, top=TOP)
    np.testing.assert_array_equal(made.add(gates * up, gates), categories(gates > 0))
    assert (made.add(gates * up) != categories(gates > 0)).any()


def test_contribution_and_effective_score_are_what_a_neuron_writes() -> None:
    rng = np.random.default_rng(0)
    down, values, answer = rng.standard_normal((6, 5)), rng.standard_normal(5), rng.standard_normal(6)
    writes = [values[j] * down[:, j] for j in range(5)]
    norms = np.linalg.norm(down, axis=0)[None]
    np.testing.assert_allclose(
        shared_neurons.contributions(values[None], norms)[0], [np.linalg.norm(w) for w in writes]
    )
    np.testing.assert_allclose(shared_neurons.effective(values, down, answer), [answer @ w for w in writes])


def test_effective_scores_are_reported_by_category() -> None:
    rng = np.random.default_rng(0)
    made, found = Tally(NORMS, top=TOP), []
    for seed in range(3):
        effects = rng.standard_normal((LANGUAGES, LAYERS, NEURONS)).astype(np.float32)
        made.add(planted(seed), effects=effects)
        found.append(effects)
    table = made.report().effective_scores
    assert table is not None
    for category, neurons in enumerate((ALL, PARTIAL, SPECIFIC, NEVER)):
        those = np.stack(found)[:, :, 1, list(neurons)]
        np.testing.assert_allclose(table[:, category, 1], [those.mean(), those.max(), those.min()], rtol=1e-5)
    assert tally(planted(0)).report().effective_scores is None
    with pytest.raises(ValueError, match="of all inputs or of none"):
        made.add(planted(3))
    with pytest.raises(ValueError, match="need effects"):
        made.add(planted(3), effects=found[0][:, :1])


def test_the_control_is_as_large_in_each_layer_and_decided_by_its_seed() -> None:
    members = tally(planted(0)).members("partial_shared")
    drawn = shared_neurons.control(members, NEURONS, 0)
    assert [len(each) for each in drawn] == [len(each) for each in members]
    assert all(len(set(each.tolist())) == len(each) and each.max() < NEURONS for each in drawn)
    again, other = shared_neurons.control(members, NEURONS, 0), shared_neurons.control(members, NEURONS, 1)
    assert [each.tolist() for each in drawn] == [each.tolist() for each in again] != [each.tolist() for each in other]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_clas_as_a_neuron_set_is_its_formula(alpha: float) -> None:
    made = tally(planted(0))
    partial, specific = made.members("partial_shared"), made.members("specific")
    h = np.random.default_rng(0).standard_normal((LAYERS, NEURONS))
    for layer, (neurons, weights) in enumerate(shared_neurons.clas(partial, specific, 0.2, 0.3)):
        in_partial, in_specific = (np.isin(np.arange(NEURONS), each[layer]) for each in (partial, specific))
        h1 = h[layer] * (1 + 0.2 * in_partial)
        h2 = h1 * (1 - 0.3 * in_specific)
        scaled = h[layer].copy()
        scaled[neurons] *= 1 + alpha * weights
        np.testing.assert_allclose(scaled, (1 - alpha) * h[layer] + alpha * h2, atol=1e-6)


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 languages"):
        categories(np.ones((1, LAYERS, NEURONS), bool))
    with pytest.raises(ValueError, match="between 1 and"):
        Tally(NORMS, top=NEURONS + 1)
    with pytest.raises(ValueError, match="no input"):
        tally().report()
    made = tally(planted(0))
    with pytest.raises(ValueError, match="languages, but"):
        made.add(planted(0)[:3])
    with pytest.raises(ValueError, match="need"):
        made.add(planted(0)[:, :2])
    with pytest.raises(ValueError, match="above 0"):
        made.members("specific", 0.0)
    with pytest.raises(ValueError, match="partial-shared and specific"):
        shared_neurons.clas([np.array([1, 2])], [np.array([2])], 0.2, 0.2)
