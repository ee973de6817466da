"""A cross-encoder of sentence-transformers: a tiny real one, made and trained here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kb.scope import ScopeError, Text
from kb.scope.cross_encoder import CrossEncoderDecider
from kb.scope.pairs import Situation
from kb.scope.storage import load, save
from tests.kb.scope.cross_encoders import untrained

pytest.importorskip("sentence_transformers")

WORDS = ["who", "wrote", "faust", "hamlet", "macbeth", "?"]
NOTHING = np.zeros(2, np.float32)


@pytest.fixture(scope="module")
def decider(tmp_path_factory: pytest.TempPathFactory) -> CrossEncoderDecider:
    folder = untrained(tmp_path_factory.mktemp("cross"), WORDS)
    made = CrossEncoderDecider(str(folder))
    facts = tuple(Text(f"who wrote {book}?", "en", NOTHING) for book in ("faust", "hamlet"))
    questions = [Text(f"{book} who wrote?", "en", NOTHING) for book in ("faust", "hamlet", "macbeth")]
    # Which text is the fact matters here, and the question doesn't: that is learned in a second.
    made.fit([Situation(each, facts, np.array([True, False])) for each in questions] * 8, epochs=20, rate=3e-3)
    return made


def test_it_learns_from_the_fact_which_it_reads_first(decider: CrossEncoderDecider) -> None:
    facts = [Text(f"who wrote {book}?", "en", NOTHING) for book in ("hamlet", "faust")]
    judged = decider.probabilities(Text("hamlet who wrote?", "de", NOTHING), facts)
    assert judged[0] < 0.5 <= judged[1]


def test_fitting_leaves_the_words_embeddings_as_they_were(tmp_path: Path) -> None:
    made = CrossEncoderDecider(str(untrained(tmp_path, WORDS)))
    facts = tuple(Text(f"who wrote {book}?", "en", NOTHING) for book in ("faust", "hamlet"))
    asked = Situation(Text("faust who wrote?", "en", NOTHING), facts, np.array([True, False]))
    network = made._model.model
    words, others = network.get_input_embeddings().weight, network.classifier.weight
    before = [each.detach().clone() for each in (words, others)]
    made.fit([asked] * 4, epochs=2, rate=1e-2)
    assert (words == before[0]).all() and (others != before[1]).any()


def test_it_learns_from_questions_that_are_about_no_fact(tmp_path: Path) -> None:
    made = CrossEncoderDecider(str(untrained(tmp_path, WORDS)))
    facts = tuple(Text(f"who wrote {book}?", "en", NOTHING) for book in ("faust", "hamlet"))
    question = Text("who wrote macbeth?", "en", NOTHING)
    (before,) = made.log_odds(question, facts[:1])
    made.fit([Situation(question, facts, np.zeros(2, bool))] * 16, epochs=4, rate=3e-3)
    assert made.log_odds(question, facts[:1])[0] < before - 1


def test_it_survives_a_folder(decider: CrossEncoderDecider, tmp_path: Path) -> None:
    save(decider, tmp_path / "scope")
    loaded = load(tmp_path / "scope")
    question, facts = Text("faust who wrote?", "de", NOTHING), [Text("who wrote faust?", "en", NOTHING)]
    assert loaded.encoder is None
    # It is served in 16 bits where the CPU multiplies such.
    np.testing.assert_allclose(loaded.probabilities(question, facts), decider.probabilities(question, facts), atol=0.02)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScopeError, match="can't be loaded"):
        CrossEncoderDecider(str(tmp_path / "nothing"))
