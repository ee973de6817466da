"""The index in memory, and the file that it is kept in."""

from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

from kb import snapshots
from kb.backends.sqlite.facts import SqliteFacts
from kb.collection import Collection
from kb.errors import KbFull
from kb.facts import FactDraft
from kb.filters import Filter
from kb.index import IndexOptions, VectorIndex
from kb.knowledge_base import KnowledgeBase
from tests.kb.ngrams import Ngrams

DIMENSION = 24


def unit(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, DIMENSION)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_an_index_equals_a_plain_comparison_through_changes(kind: Any) -> None:
    chance = np.random.default_rng(1)
    vectors = unit(600)
    truth = {number: vectors[number] for number in range(400)}
    options = IndexOptions(kind, hnsw_search=600, ivf_probes=1000)
    numbers = np.arange(400)
    index = VectorIndex.build(DIMENSION, options, numbers, numbers + 1, vectors[:400])
    assert index.kind == kind
    for step in range(20):
        changed = chance.choice(450, 30, replace=False)
        if step % 3 == 0:
            index.remove(changed)
            for number in changed:
                truth.pop(int(number), None)
        else:
            new = unit(30, seed=10 + step)
            index.put(changed, changed + 1000 * step, new)
            truth |= {int(number): vector for number, vector in zip(changed, new, strict=True)}
    assert index.facts == len(truth)
    known = np.array(sorted(truth))
    for allowed in (None, known[::5], known[:1], np.array([10_000])):
        found = index.search(vectors[500:], 10, allowed)
        among = known if allowed is None else np.intersect1d(known, allowed)
        scores = vectors[500:] @ np.stack([truth[n] for n in among]).T if len(among) else np.empty((100, 0))
        best = -np.sort(-scores, axis=1)[:, :10]
        assert found.scores.shape == best.shape
        np.testing.assert_allclose(found.scores, best, atol=1e-5)
        assert set(found.numbers.ravel()) <= set(among)


def test_an_index_grows_out_of_its_kind() -> None:
    options = IndexOptions(exact_below=100)
    index = VectorIndex.build(DIMENSION, options, np.arange(100), np.arange(100), unit(100))
    assert (index.kind, index.outdated) == ("flat", False)
    index.put(np.array([100]), np.array([100]), unit(1))
    assert index.outdated
    assert VectorIndex.build(DIMENSION, options, np.arange(101), np.arange(101), unit(101)).kind == "hnsw"


def draft(number: int, text: str = "fact") -> FactDraft:
    return FactDraft(id=f"f{number}", text=f"{text} of number {number}")


Open = Callable[..., Collection]


@pytest.fixture
def reopen(tmp_path: Path) -> Iterator[Open]:
    opened: list[KnowledgeBase] = []

    def reopen(**options: Any) -> Collection:
        opened.append(KnowledgeBase.open(tmp_path / "kb", IndexOptions(**options)))
        return opened[-1].create("facts", Ngrams().identity)[0]

    yield reopen
    for base in opened:
        base.close()


def write(collection: Collection, *drafts: FactDraft) -> None:
    collection.upsert(drafts, encode=Ngrams().encode_documents)


def ids(collection: Collection) -> set[str]:
    return {hit.fact.id for hit in collection.search(Ngrams().encode_queries(["fact"]), 1000)[0]}


def made_from(collection: Collection) -> str:
    return str(collection.stats().index["made_from"])


def live_index(collection: Collection) -> Any:
    store = collection._store
    assert isinstance(store, SqliteFacts)
    return store.index


def test_a_deleted_fact_is_dead_in_the_index(reopen: Open) -> None:
    collection = reopen()
    write(collection, *map(draft, range(9)))
    assert len(ids(collection)) == 9
    collection.delete(["f1", "f2"])
    assert len(ids(collection)) == 7
    assert (collection.stats().index["facts"], collection.stats().index["dead"]) == (7, 2)


@pytest.mark.parametrize("kind", ["flat", "hnsw", "ivf"])
def test_a_snapshot_is_used_and_what_it_lacks_is_read(reopen: Open, kind: str) -> None:
    collection = reopen(kind=kind)
    write(collection, *map(draft, range(80)))
    collection.delete(["f3"])
    assert collection.snapshot()["facts"] == 79
    write(collection, draft(5, "changed"), draft(90))
    collection.delete(["f4"])
    again = reopen(kind=kind)
    assert ids(again) == {f"f{number}" for number in range(80)} - {"f3", "f4"} | {"f90"}
    assert made_from(again) == "snapshot"
    (hit,) = again.search(Ngrams().encode_queries(["changed of number 5"]), 1)[0]
    assert (hit.fact.id, hit.score) == ("f5", pytest.approx(1, abs=1e-5))


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def cut(path: Path, at: float) -> None:
    path.write_bytes(path.read_bytes()[: int(at * path.stat().st_size)])


@pytest.mark.parametrize("damage", [flip, cut])
@pytest.mark.parametrize("at", [0.0, 0.01, 0.5, 0.999])
def test_a_damaged_snapshot_is_said_and_not_used(
    reopen: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path, float], None], at: float
) -> None:
    collection = reopen()
    write(collection, *map(draft, range(50)))
    collection.snapshot()
    (path,) = (tmp_path / "kb" / "indexes").iterdir()
    damage(path, at)
    again = reopen()
    assert len(ids(again)) == 50
    assert made_from(again) == "facts"
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "not used" in caplog.text


def test_a_full_disk_ends_a_snapshot_and_leaves_the_one_before(reopen: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full stands for the file: the kernel itself says that there is no room."""
    collection = reopen()
    write(collection, *map(draft, range(60)))
    collection.snapshot()
    write(collection, *map(draft, range(60, 90)))
    open_file = Path.open

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        if mode == "xb":
            path.symlink_to("/dev/full")
            mode = "wb"
        return open_file(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(KbFull, match="free some room"):
            collection.snapshot()
    again = reopen()
    assert (len(ids(again)), made_from(again)) == (90, "snapshot")


def test_a_snapshot_of_other_writes_is_not_used(reopen: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A backup was put back, and as much was written since as the snapshot has."""
    collection = reopen()
    write(collection, draft(1))
    backup = tmp_path / "backup"
    folder = tmp_path / "kb"
    live_index(collection)._db.close()
    shutil.copytree(folder, backup)
    write(collection, draft(2))
    collection.snapshot()
    live_index(collection)._db.close()
    for path in folder.glob("kb.sqlite3*"):
        path.unlink()
    for path in backup.glob("kb.sqlite3*"):
        shutil.copy(path, folder)
    restored = reopen()
    write(restored, draft(3))
    assert restored.stats().last_seq == 2
    again = reopen()
    assert ids(again) == {"f1", "f3"}
    assert "other writes" in caplog.text


def test_a_snapshot_of_another_encoder_or_collection_is_not_read(tmp_path: Path) -> None:
    index = VectorIndex.build(DIMENSION, IndexOptions(), np.arange(9), np.arange(9), unit(9))
    path = tmp_path / "a.index"
    snapshots.write(path, snapshots.pack(index), {"encoder": "one", "collection": "c"})
    assert snapshots.read(path, {"encoder": "one", "collection": "c"}, IndexOptions()).facts == 9
    with pytest.raises(snapshots.BadSnapshot, match="another encoder"):
        snapshots.read(path, {"encoder": "two", "collection": "c"}, IndexOptions())
    assert [each.name for each in tmp_path.iterdir()] == ["a.index"]


def test_dead_vectors_are_cleared_away_in_the_background(reopen: Open) -> None:
    collection = reopen(dead_share=0.1)
    write(collection, *map(draft, range(1000)))
    ids(collection)
    for start in range(0, 400, 100):
        write(collection, *(draft(number, f"round {start}") for number in range(300)))
    live_index(collection).settle()
    ids(collection)
    live_index(collection).settle()
    index = collection.stats().index
    assert index["facts"] == 1000 and index["dead"] <= 256
    assert len(ids(collection)) == 1000


def test_a_large_collection_is_kept_and_changes_its_kind_in_the_background(reopen: Open, tmp_path: Path) -> None:
    options = {"exact_below": 150, "snapshot_from": 100, "snapshot_share": 0.2}
    collection = reopen(**options)
    write(collection, *map(draft, range(120)))
    assert len(ids(collection)) == 120
    live_index(collection).settle()
    assert len(list((tmp_path / "kb" / "indexes").iterdir())) == 1
    write(collection, *map(draft, range(120, 200)))
    assert len(ids(collection)) == 200
    live_index(collection).settle()
    assert collection.stats().index["kind"] == "hnsw"
    assert len(ids(collection)) == 200
    live_index(collection).settle()
    again = reopen(**options)
    assert len(ids(again)) == 200
    assert (again.stats().index["kind"], made_from(again)) == ("hnsw", "snapshot")


def test_searches_go_on_while_facts_change(reopen: Open) -> None:
    """Each hit is a fact as it is, with the score of that version."""
    collection = reopen(dead_share=0.05)
    encoder = Ngrams()
    write(collection, *map(draft, range(300)))
    ended = threading.Event()
    wrong: list[object] = []

    def search() -> None:
        while not ended.is_set():
            texts = [f"fact of number {number}" for number in range(0, 300, 30)]
            queries = encoder.encode_queries(texts)
            for query, hits in zip(queries, collection.search(queries, 5), strict=True):
                for hit in hits:
                    expected = float(query @ encoder.encode_documents([hit.fact.key])[0])
                    if hit.fact.deleted or abs(hit.score - expected) > 1e-4:
                        wrong.append(hit)

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for round in range(30):
        write(collection, *(draft(number, f"round {round}") for number in range(round % 7, 300, 7)))
        collection.delete([f"f{round}"])
    ended.set()
    for thread in threads:
        thread.join()
    live_index(collection).settle()
    assert wrong == []
    assert ids(collection) == {fact.id for fact in collection.facts(limit=1000).facts}


def test_an_index_takes_no_more_threads_than_it_may() -> None:
    numbers = np.arange(50)
    told = []

    def work() -> None:
        index = VectorIndex.build(DIMENSION, IndexOptions(threads=1), numbers, numbers, unit(50))
        told.append(faiss.omp_get_max_threads())
        faiss.omp_set_num_threads(2)
        index.search(unit(1), 1)
        told.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert told == [1, 1]


def test_a_filter_by_language_reads_the_index_of_languages_only(tmp_path: Path) -> None:
    base = KnowledgeBase.open(tmp_path)
    collection, _ = base.create("facts", Ngrams().identity)
    store = collection._store
    assert isinstance(store, SqliteFacts)
    statements: list[str] = []
    with store._db.connection() as db:
        db.set_trace_callback(statements.append)
    store._numbers(Filter(language=["de", "en"]), datetime.now(UTC))
    with store._db.connection() as db:
        db.set_trace_callback(None)
        (statement,) = (each for each in statements if each.startswith("SELECT key FROM facts"))
        plan = " ".join(row["detail"] for row in db.execute(f"EXPLAIN QUERY PLAN {statement}"))
    assert "USING COVERING INDEX facts_by_language (collection=? AND language=?" in plan, plan
    base.close()
