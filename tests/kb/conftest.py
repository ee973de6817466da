from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kb.collection import Collection
from kb.index import IndexOptions
from kb.knowledge_base import KnowledgeBase
from tests.kb import postgres as postgres_server
from tests.kb.ngrams import Ngrams

BACKENDS = ("flat", "hnsw", "ivf", "qdrant", "postgres")


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL server with pgvector, started for this session."""
    with postgres_server.running() as url:
        yield url


@pytest.fixture(params=BACKENDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], KnowledgeBase]]:
    """Opens the same knowledge base again and again; what was opened before is closed."""
    kind = request.param
    if kind == "postgres":
        where = request.getfixturevalue("postgres")
    else:
        where = f"qdrant+file:{tmp_path / 'qdrant'}" if kind == "qdrant" else str(tmp_path / "kb")
    opened: list[KnowledgeBase] = []

    def close() -> None:
        while opened:
            opened.pop().close()

    def open_again() -> KnowledgeBase:
        close()
        options = IndexOptions(kind=kind) if kind in ("flat", "hnsw", "ivf") else IndexOptions()
        opened.append(KnowledgeBase.open(where, options))
        return opened[-1]

    yield open_again
    base = open_again()
    for info in base.collections():
        base.drop(info.name)
    close()


@pytest.fixture
def encoder() -> Ngrams:
    return Ngrams()


@pytest.fixture
def collection(place: Callable[[], KnowledgeBase], encoder: Ngrams) -> Collection:
    return place().create("facts", encoder.identity)[0]
