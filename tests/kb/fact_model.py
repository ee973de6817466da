"""What a collection of few ids should hold, written down without a database."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kb.collection import Collection
from kb.facts import FactDraft
from kb.filters import Filter
from tests.kb.ngrams import Ngrams

ENCODER = Ngrams()
Operation = list[Any]
"""["upsert", [[id, subject, answer], ...]], ["delete", [id, ...]], ["delete_of", subject], ["snapshot"], ["rebuild"]"""


class Known(NamedTuple):
    """A fact as of its last version."""

    version: int
    subject: str
    answer: str
    deleted: bool


@dataclass
class Model:
    facts: dict[str, Known] = field(default_factory=dict)

    def alive(self) -> dict[str, Known]:
        return {id: known for id, known in self.facts.items() if not known.deleted}

    def apply(self, operation: Operation) -> Any:
        """Do it, and return what the collection must answer."""
        action, *arguments = operation
        if action == "upsert":
            return [self._upsert(*each) for each in arguments[0]]
        if action == "delete":
            return self._delete([id for id in arguments[0] if id in self.alive()])
        if action == "delete_of":
            return self._delete([id for id, known in self.alive().items() if known.subject == arguments[0]])
        return len(self.alive())

    def _upsert(self, id: str, subject: str, answer: str) -> list[Any]:
        known = self.facts.get(id, Known(0, "", "", True))
        if not known.deleted and (known.subject, known.answer) == (subject, answer):
            return ["unchanged", known.version]
        self._delete([other for other, each in self.alive().items() if other != id and each.subject == subject])
        self.facts[id] = Known(known.version + 1, subject, answer, False)
        return ["created" if known.deleted else "updated", known.version + 1]

    def _delete(self, ids: list[str]) -> int:
        for id in ids:
            self.facts[id] = self.facts[id]._replace(version=self.facts[id].version + 1, deleted=True)
        return len(ids)


def draft(id: str, subject: str, answer: str) -> FactDraft:
    return FactDraft(id=id, question=key(id, answer), answer=answer, subject=subject, relation="r")


def key(id: str, answer: str) -> str:
    return f"question of {id} with {answer}"


def perform(collection: Collection, operation: Operation) -> Any:
    """The same as `Model.apply`, by the collection."""
    action, *arguments = operation
    if action == "upsert":
        drafts = [draft(*each) for each in arguments[0]]
        outcomes = collection.upsert(drafts, encode=ENCODER.encode_documents)
        return [[outcome.status, outcome.version] for outcome in outcomes]
    if action == "delete":
        return collection.delete(arguments[0]).facts
    if action == "delete_of":
        return collection.delete(where=Filter(subject=arguments[0])).facts
    return collection.snapshot()["facts"] if action == "snapshot" else collection.rebuild()["facts"]


def observed(collection: Collection) -> Model:
    facts = collection.facts(limit=1000, deleted=True).facts
    return Model({f.id: Known(f.version, f.subject or "", f.answer or "", f.deleted) for f in facts})


def check(collection: Collection, model: Model) -> None:
    """The index has each fact once, as it is now, and nothing else; every version is in the history."""
    alive = model.alive()
    queries = ENCODER.encode_queries([key(id, known.answer) for id, known in alive.items()] or ["nothing"])
    for hits, (id, known) in zip(collection.search(queries, 1000), alive.items(), strict=False):
        assert sorted(hit.fact.id for hit in hits) == sorted(alive)
        best = next(hit for hit in hits if hit.fact.id == id)
        assert abs(best.score - 1) < 1e-5 and best.fact.answer == known.answer, (id, known, best)
    if not alive:
        assert collection.search(queries, 10) == [[]]
    assert collection.stats().index["facts"] == len(alive)
    assert {id: vector.shape for id, vector in _vectors(collection).items()} == dict.fromkeys(alive, (64,))
    for id, known in model.facts.items():
        assert [fact.version for fact in collection.history(id)] == list(range(1, known.version + 1))


def _vectors(collection: Collection) -> dict[str, Any]:
    return {fact.id: vector for fact, vector in collection.each()}
