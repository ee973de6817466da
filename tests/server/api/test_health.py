"""`/readyz` on real parts, each broken in turn; only the engine is a stand-in."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kb.knowledge_base import KnowledgeBase
from server.api import health
from server.api.admission import Load
from server.api.health import DeepCheck
from server.keys import KeyStore
from steering_store import Store

ENGINE_SAYS = "cuda:0 at 10.0.0.7 is gone"


class Engine:
    alive = True

    async def one_token(self) -> None:
        raise OSError(ENGINE_SAYS)


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[SimpleNamespace]:
    engine = Engine()
    parts = SimpleNamespace(
        engine=engine,
        load=Load(10, 1000),
        store=Store(tmp_path / "artifacts"),
        kb=KnowledgeBase.open(tmp_path / "kb"),
        keys=KeyStore(tmp_path),
        deep_check=DeepCheck(engine),  # type: ignore[arg-type]
    )
    yield parts
    parts.kb.close()
    parts.keys.close()


@pytest.fixture
def client(parts: SimpleNamespace) -> Iterator[TestClient]:
    app = FastAPI()
    app.state.polyhelm = parts
    app.include_router(health.router)
    with TestClient(app) as client:
        yield client


def _shut_store(parts: SimpleNamespace, folder: Path) -> None:
    shutil.rmtree(folder / "artifacts")
    (folder / "artifacts").touch()


def _shut_kb(parts: SimpleNamespace, folder: Path) -> None:
    parts.kb.close()
    for each in (folder / "kb").glob("kb.sqlite3*"):
        each.write_bytes(b"not a database" * 1000)


def _shut_keys(parts: SimpleNamespace, folder: Path) -> None:
    parts.keys.close()


def test_all_is_well(client: TestClient) -> None:
    answer = client.get("/readyz")
    assert answer.status_code == 200
    assert answer.json()["checks"] == dict.fromkeys(("engine", "traffic", "store", "kb", "keys"), "ok")


@pytest.mark.parametrize(("name", "shut"), [("store", _shut_store), ("kb", _shut_kb), ("keys", _shut_keys)])
def test_part_that_cannot_be_read_is_named_and_only_the_log_says_why(
    client: TestClient,
    parts: SimpleNamespace,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    shut: Callable[[SimpleNamespace, Path], None],
) -> None:
    shut(parts, tmp_path)
    with caplog.at_level(logging.ERROR):
        answer = client.get("/readyz")
    assert answer.status_code == 503
    assert {key for key, said in answer.json()["checks"].items() if said != "ok"} == {name}
    (record,) = caplog.records
    assert record.exc_info is not None and record.exc_info[1] is not None
    assert str(tmp_path) not in answer.text and str(record.exc_info[1]) not in answer.text


def test_nobody_is_told_in_the_engines_own_words_what_is_wrong(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.get("/readyz?deep=1")
    assert answer.status_code == 503
    assert answer.json()["checks"]["generation"].startswith("OSError: ")
    assert "10.0.0.7" not in answer.text and ENGINE_SAYS in caplog.text
