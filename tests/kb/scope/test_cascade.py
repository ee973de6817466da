"""A head and a cross-encoder together: a real head, and a tiny cross-encoder that knows some words."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kb.encoders import load as load_encoder
from kb.scope import ScopeError
from kb.scope.cascade import DOUBT, READ, CascadeDecider, Weights, doubted
from kb.scope.cross_encoder import CrossEncoderDecider
from kb.scope.head import HeadDecider
from kb.scope.pairs import Encoded, Questions, Situation, encode, situations
from kb.scope.storage import SETTINGS, load, save
from kb.scope.training import fit_cascade, fit_head, fit_weights, split
from tests.kb.scope.cross_encoders import untrained
from tests.kb.scope.questions import groups

pytest.importorskip("sentence_transformers")
ENCODER = load_encoder("e5-small")
FALSE_FIRES = 0.05


@pytest.fixture(scope="module")
def known() -> Encoded:
    return encode(Questions(groups(80, seed=0)), ENCODER)


@pytest.fixture(scope="module")
def sure(known: Encoded) -> HeadDecider:
    return fit_head(known, ENCODER.identity, false_fires=FALSE_FIRES, report=lambda _: None)


@pytest.fixture(scope="module")
def head(sure: HeadDecider) -> HeadDecider:
    """One that is less sure than questions as clear as these make it."""
    network = sure.network
    damped = network._replace(linear=network.linear * 0.15, out=network.out * 0.15)
    return replace(sure, network=damped, bias=sure.bias * 0.15)


@pytest.fixture(scope="module")
def reader(known: Encoded, tmp_path_factory: pytest.TempPathFactory) -> CrossEncoderDecider:
    words = [word for group in known.groups for text, _ in group.questions for word in text.lower().split()]
    return CrossEncoderDecider(str(untrained(tmp_path_factory.mktemp("cross"), words)))


@pytest.fixture(scope="module")
def cascade(known: Encoded, head: HeadDecider, reader: CrossEncoderDecider) -> CascadeDecider:
    return fit_cascade(split(known, 0)[1], head, reader, false_fires=FALSE_FIRES)


@pytest.fixture(scope="module")
def asked() -> list[Situation]:
    return list(situations(encode(Questions(groups(40, seed=1)), ENCODER), per_group=8, seed=2))


def test_where_the_head_is_sure_it_decides(
    head: HeadDecider, reader: CrossEncoderDecider, asked: list[Situation]
) -> None:
    other = CascadeDecider(head, reader, Weights(-1.0, 5.0, 3.0))
    clear = [each for each in asked if not len(doubted(head.log_odds(each.question, each.candidates)))]
    assert len(clear) > 20
    for each in clear:
        np.testing.assert_array_equal(
            other.probabilities(each.question, each.candidates), head.probabilities(each.question, each.candidates)
        )


def test_where_it_is_in_doubt_the_likeliest_facts_are_read(
    head: HeadDecider, reader: CrossEncoderDecider, asked: list[Situation]
) -> None:
    other, seen = CascadeDecider(head, reader, Weights(0.5, 2.0, -0.25)), 0
    for each in asked:
        odds = head.log_odds(each.question, each.candidates)
        if not DOUBT[0] < odds.max() < DOUBT[1]:
            continue
        seen += 1
        best = np.argsort(-odds)[:READ]
        read = reader.log_odds(each.question, [each.candidates[n] for n in best])
        judged = other.probabilities(each.question, each.candidates)
        np.testing.assert_allclose(np.log(judged / (1 - judged))[best], 0.5 * odds[best] + 2 * read - 0.25, atol=1e-4)
        assert judged.max() == judged[best].max(), "what wasn't read isn't likeliest"
    assert seen > 20


def test_its_decision_is_set_on_near_misses_that_neither_has_seen(cascade: CascadeDecider, known: Encoded) -> None:
    kept = split(known, 0)[1]
    assert not {group.questions for group in kept.groups} & {group.questions for group in split(known, 0)[0].groups}
    fires = [
        cascade.probabilities(each.question, each.candidates).max() >= 0.5
        for each in situations(kept, per_group=24, seed=1)
        if not each.matches.any()
    ]
    assert len(fires) > 100 and np.mean(fires) <= FALSE_FIRES


def test_a_head_that_is_never_in_doubt_decides_alone(
    sure: HeadDecider, reader: CrossEncoderDecider, known: Encoded, asked: list[Situation]
) -> None:
    network = sure.network
    certain = replace(
        sure, network=network._replace(linear=network.linear * 9, out=network.out * 9), bias=sure.bias * 9
    )
    both = fit_cascade(split(known, 0)[1], certain, reader, false_fires=FALSE_FIRES)
    assert np.isfinite(both.weights).all()
    for each in asked:
        fires = certain.probabilities(each.question, each.candidates) >= 0.5
        if not len(doubted(certain.log_odds(each.question, each.candidates))):
            assert (fires == (both.probabilities(each.question, each.candidates) >= 0.5)).all()


def test_weights_are_those_that_made_the_labels() -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(20000, 2)) * 3
    labels = random.random(20000) < 1 / (1 + np.exp(-(0.5 * rows[:, 0] + 1.5 * rows[:, 1] - 2)))
    np.testing.assert_allclose(fit_weights(rows, labels), [0.5, 1.5], rtol=0.1)


def test_weights_stay_finite_where_one_column_tells_all() -> None:
    rows = np.stack([np.linspace(-1, 1, 50), np.zeros(50)], axis=1)
    weights = fit_weights(rows, rows[:, 0] > 0)
    assert np.isfinite(weights).all() and weights[0] > 1


def test_a_cascade_survives_a_folder(cascade: CascadeDecider, asked: list[Situation], tmp_path: Path) -> None:
    save(cascade, tmp_path / "scope")
    loaded = load(tmp_path / "scope")
    assert (loaded.name, loaded.encoder) == ("cascade", ENCODER.identity)
    for each in asked[:40]:
        np.testing.assert_allclose(
            loaded.probabilities(each.question, each.candidates),
            cascade.probabilities(each.question, each.candidates),
            atol=0.03,  # it is served in 16 bits where the CPU multiplies such
        )


@pytest.mark.parametrize("weights", [None, {}, {"head": 1.0}, {"head": "x", "reader": 1.0, "bias": 0.0}])
def test_a_cascade_without_its_weights_is_refused(cascade: CascadeDecider, tmp_path: Path, weights: object) -> None:
    save(cascade, tmp_path / "scope")
    settings = tmp_path / "scope" / SETTINGS
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"weights": weights}))
    with pytest.raises(ScopeError):
        load(tmp_path / "scope")
