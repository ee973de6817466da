"""Facts from a stream, whatever the pieces that it comes in."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kb.collection import Collection
from kb.errors import FactTooLarge
from kb.imports import Importer, LineOutcome
from kb.knowledge_base import KnowledgeBase
from tests.kb.ngrams import Ngrams


@pytest.fixture
def collection(tmp_path: Path) -> Iterator[Collection]:
    base = KnowledgeBase.open(tmp_path)
    yield base.create("facts", Ngrams().identity)[0]
    base.close()


def line(number: int, **fields: Any) -> bytes:
    return json.dumps({"id": f"f{number}", "text": f"fact {number}"} | fields).encode() + b"\n"


def imported(collection: Collection, pieces: Iterator[bytes] | list[bytes], most: int = 4096) -> list[LineOutcome]:
    importer = Importer(collection, Ngrams().encode_documents, most)
    results = [result for piece in pieces for result in importer.feed(piece)]
    results += importer.finish()
    importer.close()
    return results


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 20])
def test_pieces_of_any_size_make_the_same_facts(collection: Collection, size: int) -> None:
    stream = line(1, text="Zürich 東京") + b"\r\n" + line(2).replace(b"\n", b"\r\n") + b"x" * 9000 + b"\n" + line(3)
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    results = imported(collection, pieces)
    assert [(result.line, result.outcome.status) for result in results] == [
        (1, "created"),
        (3, "created"),
        (4, "error"),
        (5, "created"),
    ]
    assert isinstance(results[2].outcome.error, FactTooLarge)
    assert collection.get("f1").text == "Zürich 東京"


def test_what_feed_returned_is_written(collection: Collection) -> None:
    importer = Importer(collection, Ngrams().encode_documents)
    results = importer.feed(b"".join(line(number) for number in range(750)))
    assert len(results) == 500 == collection.stats().facts == importer.summary.created
    assert len(importer.finish()) == 250
    assert collection.stats().facts == importer.summary.created == 750
    importer.close()


def test_memory_is_constant_in_the_length_of_the_stream_and_of_a_line(collection: Collection) -> None:
    def peak(pieces: Iterator[bytes]) -> int:
        importer = Importer(collection, Ngrams().encode_documents, 4096)
        tracemalloc.start()
        for piece in pieces:
            importer.feed(piece)
        importer.finish()
        importer.close()
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    def facts(count: int) -> Iterator[bytes]:
        return (line(number, source="x" * 3000) for number in range(count))

    # 12 MB more to read.
    assert peak(facts(5000)) < peak(facts(1000)) + (4 << 20)
    assert peak(b"x" * (1 << 16) for _ in range(500)) < 1 << 20
