"""What a collection does, in every backend."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest

from kb.collection import Collection
from kb.errors import (
    CollectionDiffers,
    CollectionNotFound,
    DuplicateId,
    EncoderMismatch,
    FactConflict,
    FactNotFound,
    InvalidCollection,
    InvalidFilter,
    InvalidVector,
)
from kb.facts import FactDraft
from kb.filters import Filter
from kb.knowledge_base import KnowledgeBase
from tests.kb.ngrams import Ngrams

CITIES = {"france": "Paris", "italy": "Rome", "spain": "Madrid", "kenya": "Nairobi", "peru": "Lima"}


def draft(country: str, **changes: Any) -> FactDraft:
    fields = {
        "id": country,
        "question": f"What is the capital of {country}?",
        "answer": CITIES.get(country, "?"),
        "language": "en",
        "subject": country,
        "relation": "capital",
    }
    return FactDraft(**fields | changes)


def cities() -> list[FactDraft]:
    return [draft(country) for country in CITIES]


def write(collection: Collection, encoder: Ngrams, *drafts: FactDraft, **options: Any) -> Any:
    return collection.upsert(drafts or cities(), encode=encoder.encode_documents, **options)


def found(collection: Collection, encoder: Ngrams, text: str, k: int = 1, **options: Any) -> list[str]:
    return [hit.fact.id for hit in collection.search(encoder.encode_queries([text]), k, **options)[0]]


def test_an_upserted_fact_is_found_by_its_question(collection: Collection, encoder: Ngrams) -> None:
    outcomes = write(collection, encoder)
    assert [(outcome.id, outcome.status, outcome.version) for outcome in outcomes] == [
        (country, "created", 1) for country in CITIES
    ]
    hits = collection.search(encoder.encode_queries(["What is the capital of italy?", "What's peru's capital?"]), 2)
    assert [each[0].fact.id for each in hits] == ["italy", "peru"]
    assert hits[0][0].score == pytest.approx(1, abs=1e-5)
    assert hits[0][0].score > hits[0][1].score
    assert (hits[0][0].fact.answer, hits[0][0].fact.text) == ("Rome", "What is the capital of italy? Rome")


def test_everything_is_there_after_opening_again(place: Callable[[], KnowledgeBase], encoder: Ngrams) -> None:
    moment = datetime(1990, 10, 3, 12, 30, 0, 123456, tzinfo=UTC)
    rich = draft(
        "germany",
        object="Q64",
        aliases=("BRD", "Deutschland"),
        source="wiki",
        valid_from=moment,
        metadata={"n": [1, None]},
    )
    collection = place().create("facts", encoder.identity)[0]
    write(collection, encoder, rich)
    before = collection.get("germany")
    collection.snapshot()
    last = collection.stats().last_seq
    again = place().collection("facts")
    assert again.get("germany") == before
    assert again.stats().last_seq == last > 0
    assert (before.valid_from, before.aliases, before.metadata) == (moment, ("BRD", "Deutschland"), {"n": [1, None]})
    assert found(again, encoder, "capital of germany") == ["germany"]
    assert again.info == collection.info


def test_the_same_fact_again_changes_nothing_and_is_not_encoded(collection: Collection, encoder: Ngrams) -> None:
    first = write(collection, encoder)
    encoded = encoder.encoded
    again = write(collection, encoder)
    assert [outcome.status for outcome in again] == ["unchanged"] * 5
    assert [outcome.seq for outcome in again] == [outcome.seq for outcome in first]
    assert encoder.encoded == encoded
    (outcome,) = write(collection, encoder, draft("peru", answer="Cusco"))
    assert (outcome.status, outcome.version, encoder.encoded) == ("updated", 2, encoded)
    write(collection, encoder, draft("peru", question="Where does Peru's government sit?"))
    assert encoder.encoded == encoded + 1
    assert collection.get("peru").version == 3


def test_a_fact_without_id_is_the_one_with_the_same_content(collection: Collection, encoder: Ngrams) -> None:
    fact = draft("chile", id=None, subject=None)
    first, second = write(collection, encoder, fact, fact)
    assert (first.status, second.status) == ("created", "unchanged")
    assert first.id == second.id and first.id and len(first.id) == 26
    (third,) = write(collection, encoder, fact.model_copy(update={"source": "wiki"}))
    assert (third.id, third.status, third.version) == (first.id, "updated", 2)
    assert collection.stats().facts == 1


def test_a_changed_question_is_found_and_the_old_one_is_not(collection: Collection, encoder: Ngrams) -> None:
    write(collection, encoder)
    assert found(collection, encoder, "capital of kenya") == ["kenya"]
    write(collection, encoder, draft("kenya", question="Who wrote Hamlet?"))
    (hit,) = collection.search(encoder.encode_queries(["Who wrote Hamlet?"]), 1)[0]
    assert (hit.fact.id, hit.fact.version) == ("kenya", 2)
    assert hit.score == pytest.approx(1, abs=1e-5)
    hits = collection.search(encoder.encode_queries(["What is the capital of kenya?"]), 5)[0]
    assert len(hits) == 5 and len({hit.fact.id for hit in hits}) == 5
    assert max(hit.score for hit in hits) < 0.99


def test_a_newer_fact_about_the_same_supersedes(collection: Collection, encoder: Ngrams) -> None:
    write(collection, encoder)
    (outcome,) = write(collection, encoder, draft("peru", id="new", question="Capital city of Peru?", answer="Cusco"))
    assert (outcome.status, outcome.supersedes) == ("created", ("peru",))
    assert found(collection, encoder, "Capital city of Peru?") == ["new"]
    with pytest.raises(FactNotFound):
        collection.get("peru")
    gone = collection.history("peru")[-1]
    assert (gone.deleted, gone.superseded_by, gone.version) == (True, "new", 2)
    # In another language, or about a time that the other one isn't about, a fact takes nobody's place.
    (french,) = write(collection, encoder, draft("peru", id="fr", language="fr", question="Capitale du Pérou ?"))
    assert french.supersedes == ()
    ended = datetime(1535, 1, 18, tzinfo=UTC)
    old = write(collection, encoder, draft("italy", id="old", answer="?", valid_to=ended))
    assert old[0].supersedes == ("italy",)
    later = write(collection, encoder, draft("italy", id="later", valid_from=ended))
    assert later[0].supersedes == ()


def test_facts_of_one_batch_supersede_each_other_in_order(collection: Collection, encoder: Ngrams) -> None:
    drafts = [draft("peru", id=name, answer=name) for name in ("a", "b", "c")]
    outcomes = write(collection, encoder, *drafts)
    assert [outcome.supersedes for outcome in outcomes] == [(), ("a",), ("b",)]
    assert [fact.id for fact in collection.facts().facts] == ["c"]
    assert [fact.superseded_by for fact in collection.history("b")] == [None, "c"]
    write(collection, encoder, draft("peru", id="a"))
    assert [fact.deleted for fact in collection.history("a")] == [False, True, False]


def test_a_collection_can_refuse_or_keep_a_second_fact_about_the_same(
    place: Callable[[], KnowledgeBase], encoder: Ngrams
) -> None:
    base = place()
    strict, _ = base.create("strict", encoder.identity, "refuse")
    write(strict, encoder, draft("peru"))
    with pytest.raises(FactConflict, match="'peru' already says") as refused:
        write(strict, encoder, draft("italy"), draft("peru", id="other", answer="Cusco"))
    assert refused.value.param == "1.relation"
    assert strict.stats().facts == 1, "all or nothing"
    outcomes = write(strict, encoder, draft("italy"), draft("peru", id="other"), each=True)
    assert [outcome.status for outcome in outcomes] == ["created", "error"]
    assert isinstance(outcomes[1].error, FactConflict)
    assert write(strict, encoder, draft("peru", answer="Cusco"))[0].status == "updated"
    loose, _ = base.create("loose", encoder.identity, "keep")
    write(loose, encoder, draft("peru"), draft("peru", id="other", answer="Cusco"))
    assert loose.stats().facts == 2


def test_deleted_facts_are_never_found(collection: Collection, encoder: Ngrams) -> None:
    write(collection, encoder)
    assert found(collection, encoder, "capital of spain") == ["spain"]
    assert collection.delete(["spain", "atlantis", "spain"]) == (1, ["atlantis"])
    assert "spain" not in found(collection, encoder, "What is the capital of spain?", 5)
    assert collection.delete(where=Filter(subject=["italy", "peru"], language="en")).facts == 2
    assert set(found(collection, encoder, "capital", 5)) == {"france", "kenya"}
    assert collection.delete(["spain"]) == (0, ["spain"])
    assert [(fact.version, fact.deleted) for fact in collection.history("spain")] == [(1, False), (2, True)]
    stats = collection.stats()
    assert (stats.facts, stats.deleted) == (2, 3)
    (back,) = write(collection, encoder, draft("spain"))
    assert (back.status, back.version) == ("created", 3)
    assert found(collection, encoder, "capital of spain") == ["spain"]


def test_the_text_of_a_deleted_fact_is_not_encoded_again(place: Callable[[], KnowledgeBase], encoder: Ngrams) -> None:
    collection = place().create("facts", encoder.identity)[0]
    write(collection, encoder)
    collection.delete(["peru", "kenya"])
    assert {fact.id for fact, _ in collection.each()} == CITIES.keys() - {"peru", "kenya"}
    collection = place().collection("facts")
    encoded = encoder.encoded
    (outcome, _) = write(collection, encoder, draft("peru"), draft("kenya", id="again"))
    assert encoder.encoded == encoded
    assert (outcome.status, outcome.version) == ("created", 3)
    assert found(collection, encoder, "What is the capital of kenya?") == ["again"]
    assert found(collection, encoder, "What is the capital of peru?") == ["peru"]


def test_the_vector_of_a_fact_that_was_changed_and_superseded_at_once_is_that_of_its_text(
    collection: Collection, encoder: Ngrams
) -> None:
    write(collection, encoder, draft("peru"))
    question = "Where does the government of Peru sit?"
    _, newest = write(
        collection, encoder, draft("peru", question=question), draft("peru", id="new", question="The capital?")
    )
    assert newest.supersedes == ("peru",)
    write(collection, encoder, draft("peru", subject="government", question=question))
    (hits,) = collection.search(encoder.encode_queries([question]), 1)
    assert (hits[0].fact.id, hits[0].score) == ("peru", pytest.approx(1, abs=1e-5))


def test_an_empty_filter_deletes_nothing(collection: Collection, encoder: Ngrams) -> None:
    write(collection, encoder)
    for arguments in ({"where": Filter()}, {}, {"ids": ["peru"], "where": Filter(ids=["peru"])}):
        with pytest.raises(InvalidFilter):
            collection.delete(**arguments)
    assert collection.stats().facts == 5


def test_a_search_finds_as_many_as_match_however_few(collection: Collection, encoder: Ngrams) -> None:
    many = [
        draft(
            f"country {number}",
            id=f"c{number}",
            language="sw" if number % 100 == 7 else "en",
            metadata={"even": number % 2 == 0, "n": number, "name": f"x{number}"},
        )
        for number in range(300)
    ]
    write(collection, encoder, *many)
    assert sorted(found(collection, encoder, "country 1", 10, where=Filter(language="SW"))) == ["c107", "c207", "c7"]
    assert found(collection, encoder, "country 1", 9, where=Filter(metadata={"n": 123})) == ["c123"]
    assert found(collection, encoder, "country 1", 9, where=Filter(metadata={"name": "x5", "even": False})) == ["c5"]
    assert found(collection, encoder, "country 1", 9, where=Filter(metadata={"n": True})) == []
    assert found(collection, encoder, "country 1", 9, where=Filter(metadata={"absent": 1})) == []
    assert len(found(collection, encoder, "country 1", 200, where=Filter(metadata={"even": True}))) == 150
    assert len(found(collection, encoder, "country 1", 1000)) == 300


def test_in_a_filter_true_is_not_one(collection: Collection, encoder: Ngrams) -> None:
    write(collection, encoder, draft("italy", metadata={"flag": 1}), draft("peru", metadata={"flag": True}))
    for value, expected in ((True, ["peru"]), (1, ["italy"]), (1.0, ["italy"]), ("1", []), (False, [])):
        where = Filter(metadata={"flag": value})
        assert found(collection, encoder, "capital", 5, where=where) == expected
        assert [fact.id for fact in collection.facts(where).facts] == expected


def test_only_facts_that_hold_at_the_time_are_found(collection: Collection, encoder: Ngrams) -> None:
    fall, reunion = datetime(1990, 10, 3, tzinfo=UTC), datetime(1990, 10, 3)
    write(
        collection,
        encoder,
        draft("germany", id="bonn", answer="Bonn", valid_to=fall),
        draft("germany", id="berlin", answer="Berlin", valid_from=reunion),
    )
    question = "What is the capital of germany?"
    assert found(collection, encoder, question, 5) == ["berlin"]
    assert found(collection, encoder, question, 5, at=datetime(1980, 1, 1)) == ["bonn"]
    assert found(collection, encoder, question, 5, at=fall) == ["berlin"]


def test_pages_go_through_all_facts_once_while_some_change(collection: Collection, encoder: Ngrams) -> None:
    write(collection, encoder)
    seen, cursor = [], None
    while True:
        page = collection.facts(cursor=cursor, limit=2)
        seen += [fact.id for fact in page.facts]
        write(collection, encoder, draft("france", answer=f"Paris {len(seen)}"))
        cursor = page.next
        if cursor is None:
            break
    assert sorted(seen) == sorted(CITIES)
    assert [fact.id for fact in collection.facts(Filter(subject=["kenya"])).facts] == ["kenya"]
    collection.delete(["kenya"])
    assert collection.facts(Filter(subject=["kenya"])).facts == []
    assert len(collection.facts(deleted=True).facts) == 5
    with pytest.raises(FactNotFound):
        collection.facts(cursor="atlantis")


def test_each_and_vectors_give_what_was_encoded(collection: Collection, encoder: Ngrams) -> None:
    write(collection, encoder)
    collection.delete(["italy"])
    told = {fact.id: vector for fact, vector in collection.each()}
    assert told.keys() == CITIES.keys() - {"italy"}
    facts = collection.facts().facts
    expected = encoder.encode_documents([fact.key for fact in facts])
    np.testing.assert_array_equal(np.stack(known := [v for v in collection.vectors(facts) if v is not None]), expected)
    np.testing.assert_array_equal(np.stack([told[fact.id] for fact in facts]), expected)
    assert len(known) == len(facts)
    write(collection, encoder, draft("kenya", answer="Mombasa"))
    collection.delete(["peru"])
    assert {fact.id for fact, vector in zip(facts, collection.vectors(facts), strict=True) if vector is None} == {
        "kenya",
        "peru",
    }


def test_facts_of_one_question_have_vectors_of_their_own(collection: Collection) -> None:
    rows = np.eye(64, dtype=np.float32)[:2]
    drafts = [FactDraft(id=f"f{number}", question="Who?", answer=str(number)) for number in range(2)]
    collection.upsert(drafts, rows)
    by_id = {hit.fact.id: hit.fact for hit in collection.search(rows[:1], 2)[0]}
    np.testing.assert_array_equal(np.stack(collection.vectors([by_id["f0"], by_id["f1"]])), rows)
    # Sent again without a vector, each is still what it was.
    assert [outcome.status for outcome in collection.upsert(drafts)] == ["unchanged", "unchanged"]


def test_embeddings_are_taken_at_length_one_and_checked(collection: Collection, encoder: Ngrams) -> None:
    vector = np.ones(64, np.float32)
    (outcome,) = collection.upsert([draft("peru", embedding=(3 * vector).tolist())])
    assert outcome.status == "created"
    (hit,) = collection.search(vector[None], 1)[0]
    assert hit.score == pytest.approx(1)
    assert collection.upsert([draft("peru", embedding=vector.tolist())])[0].status == "unchanged"
    other = np.arange(64, dtype=np.float32)
    assert collection.upsert([draft("peru", embedding=other.tolist())])[0].status == "updated"
    (hit,) = collection.search(other[None], 1)[0]
    assert hit.score == pytest.approx(1)
    for bad in ([1.0] * 63, [0.0] * 64, [float("nan")] * 64, [float("inf")] * 64, [1e300] * 64, []):
        with pytest.raises(InvalidVector) as refused:
            collection.upsert([draft("italy"), draft("kenya", embedding=bad)], [vector, None])
        assert refused.value.param == "1.embedding"
    with pytest.raises(InvalidVector, match="send 'embedding'"):
        collection.upsert([draft("spain")])
    for queries, k in ((np.ones((1, 63)), 1), (np.ones(64), 1)):
        with pytest.raises(InvalidVector):
            collection.search(queries, k)
    for k in (0, 1001):
        with pytest.raises(InvalidFilter):
            collection.search(vector[None], k)
    assert collection.search(np.empty((0, 64), np.float32), 1) == []


def test_the_same_id_twice_in_a_batch_is_refused(collection: Collection, encoder: Ngrams) -> None:
    with pytest.raises(DuplicateId) as refused:
        write(collection, encoder, draft("peru"), draft("italy"), draft("peru", answer="Cusco"))
    assert refused.value.param == "2.id"
    assert collection.stats().facts == 0
    outcomes = write(collection, encoder, draft("peru"), draft("peru", answer="Cusco"), each=True)
    assert [outcome.status for outcome in outcomes] == ["created", "error"]
    assert collection.get("peru").answer == "Lima"


def test_a_collection_belongs_to_its_encoder(place: Callable[[], KnowledgeBase], encoder: Ngrams) -> None:
    base = place()
    made, new = base.create("facts", encoder.identity)
    assert new
    same, new = base.create("facts", encoder.identity)
    assert (same.info, new) == (made.info, False)
    for other in (Ngrams("ngrams", 32), Ngrams("others")):
        with pytest.raises(EncoderMismatch, match="is of encoder 'ngrams'"):
            base.create("facts", other.identity)
    with pytest.raises(CollectionDiffers):
        base.create("facts", encoder.identity, "keep")
    for name in ("", "UPPER", "a/b", "-a", "a" * 65, ".."):
        with pytest.raises(InvalidCollection):
            base.create(name, encoder.identity)


def test_a_dropped_collection_is_gone_and_its_name_free(place: Callable[[], KnowledgeBase], encoder: Ngrams) -> None:
    base = place()
    old, _ = base.create("facts", encoder.identity)
    base.create("others", encoder.identity)
    write(old, encoder)
    base.drop("facts")
    assert [info.name for info in base.collections()] == ["others"]
    for call in (lambda: base.collection("facts"), lambda: base.drop("facts"), lambda: write(old, encoder)):
        with pytest.raises(CollectionNotFound):
            call()
    new, made = base.create("facts", Ngrams("ngrams", 32).identity)
    assert made and new.stats().facts == 0
    assert new.search(np.ones((1, 32), np.float32), 3) == [[]]


def test_rebuild_changes_nothing_that_is_found(collection: Collection, encoder: Ngrams) -> None:
    write(collection, encoder, *(draft(f"country {number}", id=f"c{number}") for number in range(100)))
    collection.delete([f"c{number}" for number in range(0, 100, 3)])
    queries = encoder.encode_queries([f"capital of country {number}" for number in range(0, 100, 9)])
    before = [[hit.fact.id for hit in each[:1]] for each in collection.search(queries, 5)]
    collection.rebuild()
    assert [[hit.fact.id for hit in each[:1]] for each in collection.search(queries, 5)] == before


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "a", "text": None},
        {"question": "q"},
        {"text": ""},
        {"text": "a\0b"},
        {"text": "\ud800"},
        {"text": "t", "metadata": {"a": "\ud800"}},
        {"text": "t", "metadata": {"a": {"b": "\0"}}},
        {"text": "t", "metadata": {"a": float("nan")}},
        {"text": "t", "id": "a/b"},
        {"text": "t", "id": ".."},
        {"text": "t", "id": "x" * 129},
        {"text": "t", "language": "not a language"},
        {"text": "t", "valid_from": "2020-01-01", "valid_to": "2020-01-01"},
        {"text": "t", "colour": "red"},
    ],
)
def test_a_malformed_fact_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        FactDraft(**fields)
