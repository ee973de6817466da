"""The routes of the knowledge base in an app of their own, with a small real encoder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx import Response

from kb.knowledge_base import KnowledgeBase
from server.api import errors, kb_collections, kb_facts, kb_import
from server.api.middleware import JsonBodies
from server.encoding import BatchedEncoder
from server.replays import Replays
from server.settings import Settings
from tests.kb.ngrams import Ngrams

ROOT = "/v1/kb/collections/facts"
NDJSON = "application/x-ndjson"


@contextmanager
def serving(folder: Path, place: str | None = None, **settings: Any) -> Iterator[TestClient]:
    """A client of a server on the folder, which must hold a knowledge base that others may use as well, or on one at
    another place."""
    app = FastAPI()
    base = KnowledgeBase.open(place or folder / "kb")
    replays = Replays(folder / "kb" / "replays.sqlite3")
    app.state.polyhelm = SimpleNamespace(
        kb=base, encoder=BatchedEncoder(Ngrams()), replays=replays, settings=Settings(**settings)
    )
    for router in (kb_collections.router, kb_facts.router, kb_import.router):
        app.include_router(router)
    errors.install(app)
    app.add_middleware(JsonBodies, max_bytes=1 << 20)
    with TestClient(app) as client:
        yield client
    replays.close()
    base.close()


def fact(number: int, **fields: Any) -> dict[str, Any]:
    return {"id": f"f{number}", "question": f"Who is number {number}?", "answer": f"Agent {number}"} | fields


def lines(*facts: Any) -> bytes:
    return b"".join((each if isinstance(each, bytes) else json.dumps(each).encode()) + b"\n" for each in facts)


def put_lines(client: TestClient, content: Any, **headers: str) -> Response:
    return client.put(f"{ROOT}/facts", content=content, headers={"Content-Type": NDJSON} | headers)


def query(client: TestClient, text: str, **fields: Any) -> list[str]:
    answer = client.post(f"{ROOT}/facts/query", json={"query": text} | fields)
    assert answer.status_code == 200, answer.text
    return [match["fact"]["id"] for match in answer.json()["data"]]


def count(client: TestClient) -> int:
    return int(client.get(f"{ROOT}/stats").json()["facts"])
