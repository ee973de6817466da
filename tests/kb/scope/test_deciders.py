"""Deciders fitted on made-up questions with the real encoder, and judged on questions about others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kb.encoders import load as load_encoder
from kb.encoders.base import EncoderIdentity
from kb.scope import Decider, ScopeError, Text
from kb.scope.head import HeadDecider
from kb.scope.pairs import CANDIDATES, Encoded, Questions, encode, out_of_scope, read_questions, situations
from kb.scope.storage import SETTINGS, TENSORS, load, save
from kb.scope.threshold import Judged, ThresholdDecider, calibrate
from kb.scope.training import fit_head, fit_threshold, quality
from tests.kb.scope.questions import aside, groups

ENCODER = load_encoder("e5-small")


@pytest.fixture(scope="module")
def known() -> Encoded:
    return encode(Questions(groups(80, seed=0)), ENCODER)


@pytest.fixture(scope="module")
def unknown() -> Encoded:
    return encode(Questions(groups(40, seed=1)), ENCODER)


@pytest.fixture(scope="module")
def head(known: Encoded) -> HeadDecider:
    return fit_head(known, ENCODER.identity, false_fires=0.02, report=lambda _: None)


def separation(decider: Decider, encoded: Encoded) -> float:
    """The share of pairs of a question about a fact and one whose fact is missing that are judged in this order."""
    inside, outside = [], []
    for each in situations(encoded, per_group=8, seed=2):
        judged = decider.probabilities(each.question, each.candidates)
        (inside if each.matches.any() else outside).append(judged.max())
    return float(np.mean(np.array(inside)[:, None] > np.array(outside)[None]))


def test_the_head_knows_facts_from_near_misses_that_it_never_saw(head: HeadDecider, unknown: Encoded) -> None:
    cosine = separation(ThresholdDecider(0.85), unknown)
    assert separation(head, unknown) > 0.995 > cosine
    assert quality(head, unknown).recall > 0.95


def test_thresholds_keep_near_misses_out_at_the_price_of_facts(known: Encoded) -> None:
    strict, lax = (fit_threshold(known, ENCODER.identity, false_fires=share) for share in (0.01, 0.3))
    strictly, laxly = quality(strict, known), quality(lax, known)
    assert strictly.false_fires < 0.1 < laxly.false_fires < 0.5 and strictly.recall < laxly.recall
    assert strict.same_language is not None and strict.same_language > strict.fallback


def test_a_situation_has_its_own_fact_every_second_time_and_never_its_own_wording(known: Encoded) -> None:
    found = list(situations(known, per_group=4, seed=0))
    assert np.mean([each.matches.any() for each in found]) == pytest.approx(0.5, abs=0.03)
    for each in found:
        assert len(each.candidates) == CANDIDATES
        assert each.question.text not in {candidate.text for candidate in each.candidates}
        cosines = [float(candidate.vector @ each.question.vector) for candidate in each.candidates]
        assert cosines == sorted(cosines, reverse=True)


def test_small_collections_bring_far_facts_and_never_more_than_was_asked_for(known: Encoded) -> None:
    def nearest(small: float) -> list[float]:
        found = situations(known, per_group=4, seed=0, small=small)
        return [float(each.candidates[0].vector @ each.question.vector) for each in found if not each.matches.any()]

    assert np.quantile(nearest(1.0), 0.25) < np.quantile(nearest(0.0), 0.05)
    kept = list(situations(known, per_group=4, seed=0, small=1.0))
    assert {len(each.candidates) for each in kept} == {1, 2, 3, CANDIDATES}
    assert np.mean([each.matches.any() for each in kept]) > 0.5, "a question's own fact stays"


@pytest.mark.parametrize("facts", [5, 40])
def test_the_head_is_silent_on_questions_about_something_else(head: HeadDecider, unknown: Encoded, facts: int) -> None:
    asked = [
        "how do i bake bread without yeast",
        "why is the sky blue",
        "was kostet ein Liter Milch",
        "сколько времени",
    ]
    told = [(group.questions[0], rows[0]) for group, rows in zip(unknown.groups, unknown.vectors, strict=True)]
    for text, vector in zip(asked, ENCODER.encode_queries(asked), strict=True):
        near = sorted(told[:facts], key=lambda each: -float(each[1] @ vector))[:CANDIDATES]
        candidates = [Text(*question, row) for question, row in near]
        assert head.probabilities(Text(text, None, vector), candidates).max() < 0.5


def test_what_is_out_of_scope_matches_nothing_and_is_asked_of_facts_in_all_languages(known: Encoded) -> None:
    beside = encode(Questions(known.groups, [*aside(known.groups, seed=2), ("Ce este un nor?", "ro")]), ENCODER)
    found = list(out_of_scope(beside, per_question=4, seed=0))
    assert [each.question for each in found[::4]] == list(beside.out_of_scope)
    assert not any(each.matches.any() for each in found)
    assert {candidate.language for each in found for candidate in each.candidates} == {"en", "de", "ru"}
    for each in found:
        cosines = [float(candidate.vector @ each.question.vector) for candidate in each.candidates]
        assert len(cosines) == CANDIDATES and cosines == sorted(cosines, reverse=True)
    assert {len(each.candidates) for each in out_of_scope(beside, per_question=4, seed=0, small=1.0)} == {1, 2, 3, 4}
    assert not list(out_of_scope(known, per_question=4, seed=0))


def test_a_head_that_learned_from_questions_out_of_scope_fires_on_fewer_of_them(
    known: Encoded, unknown: Encoded, head: HeadDecider
) -> None:
    """They name a fact's subject, and ask for something else: nothing among the groups is like it."""
    taught, untaught = (
        encode(Questions(each.groups, aside(each.groups, seed)), ENCODER) for each, seed in ((known, 3), (unknown, 4))
    )
    taught_head = fit_head(taught, ENCODER.identity, false_fires=0.05, report=lambda text: None)
    before, after = quality(head, untaught), quality(taught_head, untaught)
    assert before.out_of_scope is not None and after.out_of_scope is not None
    assert after.out_of_scope < before.out_of_scope - 0.3
    assert after.recall > 0.8 * before.recall
    assert quality(head, unknown).out_of_scope is None


def test_one_candidate_and_an_empty_question_can_be_judged(head: HeadDecider) -> None:
    question, fact = ENCODER.encode_queries(["", "Who wrote Faust?"])
    judged = head.probabilities(Text("", None, question), [Text("Who wrote Faust?", "en", fact)])
    assert judged.shape == (1,) and judged[0] < 0.5


def test_thresholds_are_per_pair_of_languages_where_enough_is_known() -> None:
    def judged(asked: str, low: float, number: int) -> list[Judged]:
        misses = [Judged(asked, "en", low + 0.001 * n, False) for n in range(number)]
        return misses + [Judged(asked, "en", low + 0.5, True)] * number

    decider = calibrate(judged("de", 0.3, 100) + judged("zh", 0.1, 100) + judged("th", 0.2, 5), None, false_fires=0.02)
    assert set(decider.thresholds) == {"de>en", "zh>en"}
    assert decider.thresholds["de>en"] == pytest.approx(0.397, abs=1e-6)
    assert decider.thresholds["zh>en"] == pytest.approx(0.197, abs=1e-6)
    fact = Text("fact", "en", np.array([1.0, 0.0]))
    for language, expected in (("de", False), ("zh", True), ("xx", False)):
        asked = Text("question", language, np.array([0.3, 0.0]))
        assert (decider.probabilities(asked, [fact])[0] >= 0.5) == expected


def test_questions_in_the_facts_own_language_have_a_threshold_of_their_own() -> None:
    decider = ThresholdDecider(0.2, {"fr>fr": 0.1}, same_language=0.4)
    asked = {"de>en": True, "en>en": False, "fr>fr": True, "None>None": True}
    for pair, expected in asked.items():
        question, fact = (None if each == "None" else each for each in pair.split(">"))
        judged = decider.probabilities(
            Text("q", question, np.array([0.3, 0.0])), [Text("f", fact, np.array([1.0, 0.0]))]
        )
        assert (judged[0] >= 0.5) == expected


def test_a_threshold_needs_near_misses() -> None:
    with pytest.raises(ScopeError, match="don't match"):
        calibrate([Judged("de", "en", 0.9, True)], None)


@pytest.mark.parametrize("kind", ["head", "threshold"])
def test_a_decider_survives_a_folder(kind: str, head: HeadDecider, unknown: Encoded, tmp_path: Path) -> None:
    decider = head if kind == "head" else ThresholdDecider(0.8, {"de>en": 0.82}, ENCODER.identity, 0.85)
    save(decider, tmp_path / "scope", {"data": "made up"})
    loaded = load(tmp_path / "scope")
    assert (loaded.name, loaded.encoder) == (kind, ENCODER.identity)
    for each in list(situations(unknown, per_group=1, seed=0))[:10]:
        np.testing.assert_array_equal(
            loaded.probabilities(each.question, each.candidates), decider.probabilities(each.question, each.candidates)
        )
    with pytest.raises(ScopeError, match="already"):
        save(decider, tmp_path / "scope")


@pytest.mark.parametrize(
    "damage", ["no settings", "not json", "format", "kind", "no tensors", "half", "dimension", "network", "languages"]
)
def test_a_damaged_folder_is_refused(head: HeadDecider, tmp_path: Path, damage: str) -> None:
    save(head, tmp_path)
    settings, tensors = tmp_path / SETTINGS, tmp_path / TENSORS
    written = json.loads(settings.read_text())
    match damage:
        case "no settings":
            settings.unlink()
        case "not json":
            settings.write_text("{")
        case "format":
            settings.write_text(json.dumps(written | {"format": 2}))
        case "kind":
            settings.write_text(json.dumps(written | {"kind": "oracle"}))
        case "no tensors":
            tensors.unlink()
        case "network":
            kept = load_file(tensors)
            save_file(kept | {"linear": kept["linear"][:-1]}, tensors)
        case "languages":
            settings.write_text(json.dumps(written | {"languages": written["languages"][1:]}))
        case "half":
            tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
        case "dimension":
            settings.write_text(json.dumps(written | {"encoder": EncoderIdentity("other", 8, "sha256:0")._asdict()}))
    with pytest.raises(ScopeError):
        load(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        "{}",
        '{"questions": {"en": "one"}}',
        '{"questions": {"en": [1, 2]}}',
        '{"questions": "en"}',
        '{"q": {"en": ["a?", "b?"]}}',
        '{"questions": {"en": ["a?", "b?"]}, "out_of_scope": {"en": "c?"}}',
        '{"out_of_scope": {"en": [" "]}}',
        '{"out_of_scope": {"en": []}}',
        '{"out_of_scope": ["c?"]}',
    ],
)
def test_a_bad_line_of_questions_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"questions": {"en": ["a?", "b?"]}}\n' + line)
    with pytest.raises(ScopeError, match="line 2"):
        read_questions(file)


def test_questions_out_of_scope_stand_beside_groups_and_do_not_count_as_such(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    lines = ['{"out_of_scope": {"en": "c?", "de": ["d?", "e?"]}}', '{"questions": {"en": ["a?", "b?"]}}']
    file.write_text("\n".join(lines * 50))
    read = read_questions(file)
    assert len(read.groups) == 50 and read.out_of_scope == [("c?", "en"), ("d?", "de"), ("e?", "de")] * 50
    file.write_text("\n".join(lines * 49))
    with pytest.raises(ScopeError, match="49 lines"):
        read_questions(file)


def test_too_few_lines_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "questions.jsonl"
    file.write_text('{"questions": {"en": "a?", "de": "b?"}}\n' * 10)
    with pytest.raises(ScopeError, match="10 lines"):
        read_questions(file)
