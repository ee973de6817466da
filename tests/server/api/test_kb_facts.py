"""Collections and facts over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.api.authentication import Authentication
from server.api.request_log import RequestLog
from server.keys import KeyStore
from tests.kb.ngrams import Ngrams
from tests.server.api.artifact_app import assert_refused
from tests.server.api.kb_app import ROOT, count, fact, query, serving


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving(tmp_path) as client:
        assert client.put(ROOT).status_code == 201
        yield client


def put(client: TestClient, *facts: Any) -> Any:
    answer = client.put(f"{ROOT}/facts", json=list(facts))
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def test_a_collection_is_made_once_and_belongs_to_an_encoder(client: TestClient) -> None:
    made = client.put(ROOT)
    assert made.status_code == 200
    assert made.json()["encoder"] == {"name": "ngrams", "dimension": 64, "digest": "sha256:ngrams-64"}
    assert client.get(ROOT).json() == made.json()
    other = {"name": "another", "dimension": 3, "digest": "sha256:1"}
    assert_refused(client.put(ROOT, json={"encoder": other}), 409, "ConflictError", "encoder", "make a new collection")
    assert_refused(client.put(ROOT, json={"conflicts": "keep"}), 409, "ConflictError", "conflicts", "supersede")
    assert_refused(client.put(f"{ROOT}!"), 422, "UnprocessableEntityError", "name", "a-z")
    assert_refused(client.put(ROOT, json={"colour": 1}), 422, "UnprocessableEntityError", "colour", "remove it")
    assert [each["id"] for each in client.get("/v1/kb/collections").json()["data"]] == ["facts"]
    assert client.delete(ROOT).status_code == 204
    assert_refused(client.get(ROOT), 404, "NotFoundError", "collection", "create it")
    assert_refused(client.delete(ROOT), 404, "NotFoundError", "collection")


def test_facts_are_written_found_changed_and_deleted(client: TestClient) -> None:
    results = put(client, *(fact(number) for number in range(20)))
    assert results[7] == {"id": "f7", "status": "created", "version": 1, "seq": 8}
    assert query(client, "Who is number 7?", top_k=1) == ["f7"]
    assert put(client, fact(7, answer="Nobody"))[0]["status"] == "updated"
    found = client.post(f"{ROOT}/facts/query", json={"query": "Who is number 7?", "top_k": 2}).json()
    assert found["encoder"]["name"] == "ngrams"
    first, second = (match["score"] for match in found["data"])
    assert first == pytest.approx(1, abs=1e-5)
    assert second < first
    assert found["data"][0]["fact"]["answer"] == "Nobody"
    read = client.get(f"{ROOT}/facts/f7").json()
    assert (read["id"], read["version"], read["text"]) == ("f7", 2, "Who is number 7? Nobody")
    assert client.delete(f"{ROOT}/facts/f7").status_code == 204
    assert_refused(client.delete(f"{ROOT}/facts/f7"), 404, "NotFoundError", "id")
    assert_refused(client.get(f"{ROOT}/facts/f7"), 404, "NotFoundError", "id")
    assert query(client, "Who is number 7?", top_k=1) != ["f7"]
    history = client.get(f"{ROOT}/facts/f7/history").json()["data"]
    assert [(each["version"], each["deleted"]) for each in history] == [(1, False), (2, False), (3, True)]
    assert_refused(client.get(f"{ROOT}/facts/never/history"), 404, "NotFoundError", "id")


def test_lists_go_page_by_page_and_take_filters(client: TestClient) -> None:
    put(client, *(fact(number, language="de" if number % 2 else "en") for number in range(10)))
    seen, after = [], ""
    while after is not None:
        page = client.get(f"{ROOT}/facts", params={"limit": 4} | ({"after": after} if after else {})).json()
        seen += [each["id"] for each in page["data"]]
        after = page["next"]
    assert seen == [f"f{number}" for number in range(10)]
    german = client.get(f"{ROOT}/facts", params={"language": "DE"}).json()["data"]
    assert [each["id"] for each in german] == ["f1", "f3", "f5", "f7", "f9"]
    assert_refused(client.get(f"{ROOT}/facts?after=x"), 404, "NotFoundError", "after", "next")
    assert_refused(client.get(f"{ROOT}/facts?limit=1001"), 422, "UnprocessableEntityError", "limit")
    assert_refused(client.get(f"{ROOT}/facts?language=!"), 422, "UnprocessableEntityError", "language")


def test_queries_take_filters_scores_times_and_vectors(client: TestClient) -> None:
    put(client, fact(1, language="en"), fact(2, language="de"), fact(3, valid_to="1990-01-01"))
    text = "Who is number 2?"
    assert query(client, text, filter={"language": "en"}) == ["f1"]
    assert query(client, text, min_score=0.99) == ["f2"]
    assert set(query(client, text, at="1980-01-01T00:00:00Z")) == {"f1", "f2", "f3"}
    vector = Ngrams().encode_queries([text])[0].tolist()
    found = client.post(f"{ROOT}/facts/query", json={"embedding": vector, "top_k": 1}).json()["data"]
    assert found[0]["fact"]["id"] == "f2"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "body"),
        ({"query": ""}, "query"),
        ({"query": "a", "embedding": [1.0]}, "body"),
        ({"query": "a", "top_k": 0}, "top_k"),
        ({"query": "a", "top_k": 1001}, "top_k"),
        ({"query": "a", "min_score": 2}, "min_score"),
        ({"query": "a", "filter": {"colour": "red"}}, "filter.colour"),
        ({"query": "a", "filter": {"metadata": {"a": [1]}}}, None),
        ({"query": "a", "at": "yesterday"}, "at"),
        ({"embedding": [1.0]}, "embedding"),
        ({"embedding": [0.0] * 64}, "embedding"),
        ({"query": "\ud800"}, "query"),
    ],
)
def test_a_bad_query_names_its_field(client: TestClient, body: dict[str, Any], param: str | None) -> None:
    content = json.dumps(body)
    answer = client.post(f"{ROOT}/facts/query", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422, answer.text
    error = answer.json()["error"]
    assert error["param"] == param if param else error["param"].startswith("filter.metadata.a")


def test_deletion_by_ids_or_filter_and_never_by_nothing(client: TestClient) -> None:
    put(client, *(fact(number, source="a" if number < 5 else "b") for number in range(10)))
    delete = f"{ROOT}/facts/delete"
    done = client.post(delete, json={"ids": ["f9", "zz"]}).json()
    assert (done["deleted"], done["missing"]) == (1, ["zz"])
    assert client.post(delete, json={"filter": {"source": "a"}}).json()["deleted"] == 5
    for body, param in (({}, "ids"), ({"filter": {}}, "filter"), ({"ids": []}, "ids")):
        assert_refused(client.post(delete, json=body), 422, "UnprocessableEntityError", param)
    assert count(client) == 4


def test_another_encoders_collection_takes_and_finds_embeddings_only(client: TestClient) -> None:
    other = {"name": "other", "dimension": 2, "digest": "sha256:2"}
    assert client.put("/v1/kb/collections/other", json={"encoder": other}).status_code == 201
    facts = "/v1/kb/collections/other/facts"
    refused = client.put(facts, json=[{"text": "a"}])
    assert_refused(refused, 422, "UnprocessableEntityError", "0.embedding", "other", "send 'embedding'")
    assert client.put(facts, json=[{"text": "a", "embedding": [0.6, 0.8]}]).status_code == 200
    assert_refused(
        client.post(f"{facts}/query", json={"query": "a"}), 409, "ConflictError", "query", "POLYHELM_KB_ENCODER"
    )
    found = client.post(f"{facts}/query", json={"embedding": [0.8, 0.6]}).json()
    assert found["data"][0]["score"] == pytest.approx(0.96)


def test_an_index_can_be_kept_and_made_anew(client: TestClient) -> None:
    put(client, *(fact(number) for number in range(5)))
    assert client.post(f"{ROOT}/snapshots").json()["last_seq"] == 5
    assert client.post(f"{ROOT}/rebuild").json()["facts"] == 5
    stats = client.get(f"{ROOT}/stats").json()
    assert (stats["facts"], stats["last_seq"], stats["backend"]) == (5, 5, "sqlite")


def test_a_tenant_writes_to_its_own_collections_and_reads_everybodys(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path)
    acme, operator = (
        {"Authorization": f"Bearer {keys.create('x', {'admin', 'read'}, tenant=tenant)[1]}"}
        for tenant in ("acme", None)
    )
    own = "/v1/kb/collections/acme--facts"
    with serving(tmp_path) as client:
        client.app.middleware_stack = None  # type: ignore[attr-defined]
        client.app.add_middleware(Authentication, keys=keys)  # type: ignore[attr-defined]
        client.app.add_middleware(RequestLog)  # type: ignore[attr-defined]

        assert client.put(ROOT, headers=acme).status_code == 403
        for path, headers in ((ROOT, operator), (own, acme)):
            assert client.put(path, headers=headers).status_code == 201
            assert client.put(f"{path}/facts", json=[fact(1)], headers=headers).status_code == 200
        calls = [
            ("PUT", ROOT),
            ("DELETE", ROOT),
            ("POST", f"{ROOT}/snapshots"),
            ("POST", f"{ROOT}/rebuild"),
            ("PUT", f"{ROOT}/facts"),
            ("POST", f"{ROOT}/facts/delete"),
            ("DELETE", f"{ROOT}/facts/f1"),
        ]
        sent = {"ids": ["f1"]}
        for method, path in calls:
            body = None if path == ROOT else [fact(2)] if method == "PUT" else sent
            assert client.request(method, path, json=body).status_code == 401, path
            assert client.request(method, path, json=body, headers=acme).status_code == 403, path
        asked = client.post(f"{ROOT}/facts/query", json={"query": "number 1"}, headers=acme)
        assert [each["fact"]["id"] for each in asked.json()["data"]] == ["f1"]
        assert client.delete(f"{own}/facts/f1", headers=acme).status_code == 204
