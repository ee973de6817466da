"""A knowledge base elsewhere, as POLYHELM_KB_URL names it: the same calls over HTTP, and the same answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.kb import postgres
from tests.server.api.kb_app import NDJSON, ROOT, count, fact, lines, put_lines, query, serving


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgres.running() as url:
        yield url


@pytest.fixture(params=["qdrant", "postgres"])
def serve(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], AbstractContextManager[TestClient]]:
    """Starts a server on one place, again and again."""
    qdrant = f"qdrant+file:{tmp_path / 'qdrant'}"
    place = qdrant if request.param == "qdrant" else request.getfixturevalue("url")
    return lambda: serving(tmp_path, place, max_fact_bytes=4096)


def test_every_call_works_on_it_and_all_is_there_after_a_restart(
    serve: Callable[[], AbstractContextManager[TestClient]],
) -> None:
    with serve() as client:
        assert client.put(ROOT).status_code == 201 and client.put(ROOT).status_code == 200
        assert client.put(ROOT, json={"conflicts": "keep"}).status_code == 409
        written = client.put(f"{ROOT}/facts", json=[fact(1, language="en"), fact(2, language="de")])
        assert [each["status"] for each in written.json()["data"]] == ["created", "created"], written.text
        assert client.put(f"{ROOT}/facts", json=[fact(3), fact(3)]).status_code == 422
        assert count(client) == 2
        content = lines(*(fact(number) for number in range(1, 700)), b"bad", fact(900, text="x" * 5000))
        streamed = put_lines(client, content, **{"Idempotency-Key": "k", "Accept": NDJSON})
        *_, summary = (json.loads(line) for line in streamed.text.splitlines())
        assert streamed.status_code == 422
        assert (summary["created"], summary["updated"], summary["failed"]) == (697, 2, 2)
        again = put_lines(client, content, **{"Idempotency-Key": "k"})
        assert again.headers["Idempotency-Replayed"] == "true" and again.json() == summary
        assert query(client, "Who is number 444?", top_k=1) == ["f444"]
        assert client.put(f"{ROOT}/facts", json=[fact(444, language="fr", valid_to="2020-01-01")]).status_code == 200
        assert "f444" not in query(client, "Who is number 444?")
        assert query(client, "Who is number 444?", at="2019-01-01T00:00:00Z", top_k=1) == ["f444"]
        assert query(client, "Who is it?", filter={"language": "fr"}, at="2019-01-01T00:00:00Z") == ["f444"]
        assert client.delete(f"{ROOT}/facts/f1").status_code == 204
        assert client.post(f"{ROOT}/facts/delete", json={"ids": ["f2", "none"]}).json()["deleted"] == 1
        for call in ("snapshots", "rebuild"):
            assert client.post(f"{ROOT}/{call}").status_code == 200
        before = client.get(f"{ROOT}/stats").json()
        assert (before["facts"], before["deleted"]) == (697, 2)
    with serve() as client:
        after = client.get(f"{ROOT}/stats").json()
        assert {key: after[key] for key in ("facts", "deleted", "last_seq")} == {
            key: before[key] for key in ("facts", "deleted", "last_seq")
        }
        history = client.get(f"{ROOT}/facts/f444/history").json()["data"]
        assert [version["version"] for version in history] == [1, 2]
        seen, after_id = set(), None
        while True:
            page = client.get(f"{ROOT}/facts", params={"limit": 300} | ({"after": after_id} if after_id else {})).json()
            seen |= {each["id"] for each in page["data"]}
            if not (after_id := page["next"]):
                break
        assert seen == {f"f{number}" for number in range(3, 700)}
        assert client.delete(ROOT).status_code == 204
        assert client.get(ROOT).status_code == 404
