"""Nearest facts in the order of the scope decision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from kb.collection import Collection
from kb.encoders.base import EncoderIdentity
from kb.facts import Fact, FactDraft
from kb.filters import Filter
from kb.knowledge_base import KnowledgeBase
from kb.lookup import CANDIDATES, find
from kb.scope import Text

IDENTITY = EncoderIdentity("plane", 2, "sha256:0")


class ByName:
    """Believes in the facts whose question ends like the user's, whatever their vectors say."""

    name = "by_name"
    encoder = None

    def probabilities(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        cosines = [float(each.vector @ question.vector) for each in candidates]
        assert cosines == sorted(cosines, reverse=True)
        return np.array([float(each.text[-1] == question.text[-1]) for each in candidates])


def test_the_decision_orders_the_nearest_facts(tmp_path: Path) -> None:
    collection, _ = KnowledgeBase.open(tmp_path).create("facts", IDENTITY)
    angles = np.linspace(0, 1, CANDIDATES + 2)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    drafts = [
        FactDraft(id=f"f{n}", question=f"about {n}", answer="a", language="de" if n == 2 else "en")
        for n in range(len(angles))
    ]
    collection.upsert(drafts, vectors)
    question = Text("what of 3", "en", vectors[0])
    found = find(collection, ByName(), question)
    assert [each.fact.id for each in found[:3]] == ["f3", "f0", "f1"] and len(found) == CANDIDATES
    assert found[0].probability == 1 and found[0].similarity == pytest.approx(float(vectors[3] @ vectors[0]))
    # Beyond the nearest, nothing is asked.
    assert find(collection, ByName(), Text(f"what of {CANDIDATES + 1}", "en", vectors[0]))[0].probability == 0
    assert [each.fact.id for each in find(collection, ByName(), question, where=Filter(language=["de"]))] == ["f2"]
    assert find(collection, ByName(), question, where=Filter(language=["fr"])) == []


class Restless(Collection):
    """A collection in which somebody deletes a fact, or changes one, whenever a search has just found it."""

    def __init__(self, collection: Collection, deleted: list[str], changed: list[str]) -> None:
        super().__init__(collection._store)
        self.deleted, self.changed = deleted, changed

    def vectors(self, facts: Sequence[Fact]) -> list[np.ndarray | None]:
        if self.deleted:
            self.delete([self.deleted.pop(0)])
        if self.changed:
            id = self.changed.pop(0)
            self.upsert([FactDraft(id=id, question=f"{id}, newly", answer="b")], np.array([[0.0, 1.0]]))
        return super().vectors(facts)


@pytest.mark.parametrize("times", [1, 5])
def test_a_fact_that_goes_between_search_and_decision_is_no_candidate(tmp_path: Path, times: int) -> None:
    collection, _ = KnowledgeBase.open(tmp_path).create("facts", IDENTITY)
    drafts = [FactDraft(id=f"f{n}", question=f"about {n}", answer="a") for n in range(6)]
    angles = np.linspace(0, 0.5, len(drafts))
    collection.upsert(drafts, np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))
    question = Text("what of 5", "en", np.array([1, 0], np.float32))
    restless = Restless(collection, deleted=[f"f{n}" for n in range(times)], changed=[])
    found = find(restless, ByName(), question)
    gone = [f"f{n}" for n in range(times - len(restless.deleted))]
    assert gone and {each.fact.id for each in found} == {draft.id for draft in drafts} - set(gone)
    assert found[0].fact.id == "f5" and found[0].probability == 1
    changed = find(Restless(collection, deleted=[], changed=["f5"]), ByName(), question)
    assert {each.fact.key: each.similarity for each in changed}["f5, newly"] == pytest.approx(0, abs=1e-6)
