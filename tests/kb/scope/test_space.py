"""Where vectors are compared, and what judges them."""

from __future__ import annotations

import numpy as np
import pytest

from kb.scope import Text
from kb.scope.network import LIMIT, Network
from kb.scope.pairs import Encoded, Group
from kb.scope.space import Space
from kb.scope.training import MIN_CENTRED, fit_space


def test_a_language_has_its_own_centre_and_any_other_that_of_all() -> None:
    centres = np.array([[1, 1], [2, 0], [0, 3]], np.float32)
    space = Space(("de", "zh"), centres, np.eye(2, dtype=np.float32))
    vector = np.array([5.0, 5.0], np.float32)
    asked = [Text("q", language, vector) for language in ("zh", "de", "xx", None)]
    np.testing.assert_array_equal(space.centred(asked), [[5, 2], [3, 5], [4, 4], [4, 4]])


def test_fitting_takes_the_way_from_one_language_to_the_other_out_of_the_vectors() -> None:
    random = np.random.default_rng(0)
    facts, shift = random.standard_normal((2 * MIN_CENTRED, 16)), 5 * random.standard_normal(16)
    groups = [
        Group((("a", "en"), ("b", "zh"), ("c", "xx")) if n < 3 else (("a", "en"), ("b", "zh"))) for n in range(40)
    ]
    vectors = [
        np.stack([fact, fact + shift, fact][: len(group.questions)]) for fact, group in zip(facts, groups, strict=True)
    ]
    space = fit_space(Encoded(groups, [each.astype(np.float32) for each in vectors]), seed=0)
    assert space.languages == ("en", "zh"), "three questions are too few for a centre"
    english, chinese = (
        space.centred([Text("", language, rows[n].astype(np.float32)) for rows in vectors])
        for n, language in enumerate(("en", "zh"))
    )
    np.testing.assert_allclose(english, chinese, atol=1e-4)


def test_what_is_further_out_than_anything_learned_says_no_more() -> None:
    random = np.random.default_rng(0)
    shapes = ((3,), (3,), (3,), (3, 2), (2,), (2,))
    network = Network(*(random.standard_normal(shape).astype(np.float32) for shape in shapes))._replace(
        scale=np.array([0.5, 1, 2], np.float32)
    )
    edge = network.mean + LIMIT * network.scale
    assert network(np.stack([edge, edge + 100])).tolist() == [pytest.approx(float(network(edge[None])[0]))] * 2
    row = network.mean + 0.5 * network.scale
    hidden = np.tanh(0.5 * network.hidden.sum(axis=0) + network.offsets)
    assert network(row[None])[0] == pytest.approx(0.5 * network.linear.sum() + hidden @ network.out, rel=1e-5)
    assert network.fits(3) and not network.fits(4)
    assert not network._replace(out=network.out[:1]).fits(3)
