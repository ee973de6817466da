"""What only some backends can do, and places that aren't there."""

from __future__ import annotations

from pathlib import Path

import pytest

from kb.errors import InvalidCollection, InvalidFilter, KbUnavailable
from kb.facts import FactDraft
from kb.filters import Filter
from kb.knowledge_base import KnowledgeBase
from tests.kb.ngrams import Ngrams


def drafts(count: int) -> list[FactDraft]:
    return [FactDraft(id=f"f{n}", text=f"the fact of number {n}", metadata={"rare": n % 50 == 7}) for n in range(count)]


def test_postgres_makes_an_hnsw_index_and_still_finds_all_that_match(
    postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kb.backends.postgres.HNSW_FROM", 100)
    base, encoder = KnowledgeBase.open(postgres), Ngrams()
    collection, _ = base.create("graph", encoder.identity)
    try:
        collection.upsert(drafts(400), encode=encoder.encode_documents)
        assert collection.stats().index == {"kind": "exact"}
        queries = encoder.encode_queries([f"the fact of number {n}" for n in range(0, 400, 37)])
        exact = [[round(hit.score, 5) for hit in hits[:1]] for hits in collection.search(queries, 10)]
        assert collection.rebuild() == {"kind": "hnsw"}
        assert [[round(hit.score, 5) for hit in hits[:1]] for hits in collection.search(queries, 10)] == exact
        rare = collection.search(queries, 10, where=Filter(metadata={"rare": True}))
        assert [len(hits) for hits in rare] == [8] * len(rare)
        collection.delete([f"f{n}" for n in range(350)])
        assert collection.rebuild() == {"kind": "exact"}
    finally:
        base.drop("graph")
        base.close()


@pytest.mark.parametrize(
    "url",
    ["postgresql://127.0.0.1:1/none?connect_timeout=2", "qdrant+http://127.0.0.1:1", "postgres://127.0.0.1:1/none"],
)
def test_a_place_that_can_not_be_reached_is_said(url: str) -> None:
    with pytest.raises(KbUnavailable, match="(?s)can't be reached.*check POLYHELM_KB_URL"):
        KnowledgeBase.open(url)


def test_a_url_of_something_else_is_refused() -> None:
    with pytest.raises(InvalidCollection, match="qdrant\\+http"):
        KnowledgeBase.open("milvus://127.0.0.1")


def test_qdrant_refuses_a_key_that_it_would_read_as_a_path(tmp_path: Path) -> None:
    base = KnowledgeBase.open(f"qdrant+file:{tmp_path}")
    collection, _ = base.create("facts", Ngrams().identity)
    with pytest.raises(InvalidFilter, match="letters, digits"):
        collection.facts(Filter(metadata={"a.b": 1}))
    base.close()
