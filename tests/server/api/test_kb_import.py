"""Writing facts over HTTP: JSON, streams of any length, bad input, and the same request again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from kb.backends.sqlite import database
from tests.server.api.artifact_app import assert_refused
from tests.server.api.kb_app import NDJSON, ROOT, count, fact, lines, put_lines, query, serving

UNPROCESSABLE = "UnprocessableEntityError"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with serving(tmp_path, max_fact_bytes=4096) as client:
        client.put(ROOT)
        yield client


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        (b"", 422, "body"),
        (b"[", 422, "body"),
        (b"{}", 422, "body"),
        (b"[]", 422, "body"),
        (b'[{"text": "\xff"}]', 400, None),
        (b'[{"text": "\\ud800"}]', 422, "body"),
        ([fact(0), 7], 422, "1"),
        ([fact(0), {"text": 7}], 422, "1.text"),
        ([fact(0), {"question": "q"}], 422, "1"),
        ([fact(0), fact(1, colour="red")], 422, "1.colour"),
        ([fact(0), fact(1, embedding=[1.0])], 422, "1.embedding"),
        ([fact(0), fact(1, embedding=[0.0] * 64)], 422, "1.embedding"),
        ([fact(0), fact(0, answer="again")], 422, "1.id"),
        ([fact(0), fact(1, text="x" * 5000)], 413, "1"),
        ([fact(0), fact(1, valid_from="soon")], 422, "1.valid_from"),
    ],
)
def test_a_json_body_is_written_whole_or_not_at_all(client: TestClient, body: Any, status: int, param: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.put(f"{ROOT}/facts", content=content, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert count(client) == 0


def test_a_stream_is_answered_with_a_summary_or_line_by_line(client: TestClient) -> None:
    facts = lines(*(fact(number) for number in range(1200)))
    answer = put_lines(client, facts)
    assert answer.status_code == 200
    assert {key: answer.json()[key] for key in ("lines", "created", "updated", "unchanged", "failed", "errors")} == {
        "lines": 1200,
        "created": 1200,
        "updated": 0,
        "unchanged": 0,
        "failed": 0,
        "errors": [],
    }
    assert query(client, "Who is number 777?", top_k=1) == ["f777"]
    again = put_lines(client, facts + lines(fact(3000)).rstrip(), Accept=NDJSON)
    assert again.headers["content-type"] == NDJSON
    *results, summary = [json.loads(line) for line in again.text.splitlines()]
    assert [result["line"] for result in results] == list(range(1, 1202))
    assert results[5] == {"line": 6, "id": "f5", "status": "unchanged", "version": 1, "seq": 6}
    assert results[1200]["status"] == "created"
    assert (summary["object"], summary["unchanged"], summary["created"]) == ("kb.import", 1200, 1)


def test_lines_at_fault_are_reported_and_the_others_written(client: TestClient) -> None:
    content = lines(
        fact(1),
        b'{"text": "\xff"}',
        b"not json",
        fact(2, embedding=[1.0, 2.0]),
        fact(1, answer="again"),
        fact(3, text="x" * 100_000),
        b"",
        fact(4, language="a b"),
        fact(5),
    )
    answer = put_lines(client, content + b'{"id": "f6", "text": "cut o')
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (422, 422, UNPROCESSABLE)
    assert error["message"].startswith("line 2: not a JSON object in UTF-8")
    told = {each["line"]: each["error"] for each in answer.json()["errors"]}
    assert {line: (each["code"], each["param"]) for line, each in told.items()} == {
        2: (422, None),
        3: (422, None),
        4: (422, "embedding"),
        5: (422, "id"),
        6: (413, None),
        8: (422, "language"),
        10: (422, None),
    }
    assert "on line 1" in told[5]["message"] and "the middle of a line" in told[10]["message"]
    assert (answer.json()["created"], answer.json()["failed"], answer.json()["lines"]) == (2, 7, 10)
    assert {each["id"] for each in client.get(f"{ROOT}/facts").json()["data"]} == {"f1", "f5"}


def test_ids_that_are_far_apart_in_a_stream_are_still_found_twice(client: TestClient) -> None:
    answer = put_lines(client, lines(*(fact(number) for number in range(1500)), fact(0, answer="other")))
    (error,) = answer.json()["errors"]
    assert (error["line"], error["error"]["param"], answer.json()["created"]) == (1501, "id", 1500)
    assert client.get(f"{ROOT}/facts/f0").json()["answer"] == "Agent 0"


def test_a_conflict_in_a_stream_is_409_on_its_line(client: TestClient) -> None:
    client.delete(ROOT)
    client.put(ROOT, json={"conflicts": "refuse"})
    about = {"subject": "x", "relation": "y"}
    answer = put_lines(client, lines(fact(1, **about), fact(2, **about), fact(3)))
    assert answer.status_code == 409
    assert (answer.json()["errors"][0]["line"], answer.json()["created"]) == (2, 2)


def test_a_full_disk_is_507_and_what_was_written_is_kept(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = database._connect
    monkeypatch.setattr(database, "_connect", lambda path: _without_room(connect(path), 300))
    client.app.state.polyhelm.kb._catalog._db.close()  # type: ignore[attr-defined]
    answer = put_lines(client, lines(*(fact(number, text="x" * 2000) for number in range(3000))))
    assert answer.status_code == 507, answer.text
    content = answer.json()
    assert content["error"]["type"] == "InsufficientStorageError" and "free some room" in content["error"]["message"]
    assert 0 < content["created"] < 3000
    assert count(client) == content["created"]
    assert query(client, "Who is it?", filter={"ids": ["f3", "f2999"]}) == ["f3"]
    refused = client.put(f"{ROOT}/facts", json=[fact(number, text="x" * 2000) for number in range(5000, 5300)])
    assert_refused(refused, 507, "InsufficientStorageError", None, "full")


def test_a_read_only_folder_is_503_and_read_on(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.put(f"{ROOT}/facts", json=[fact(1)]).status_code == 200
    connect = database._connect
    monkeypatch.setattr(database, "_connect", lambda path: _only_read(connect(path)))
    client.app.state.polyhelm.kb._catalog._db.close()  # type: ignore[attr-defined]
    refused = client.put(f"{ROOT}/facts", json=[fact(2)])
    assert_refused(refused, 503, "ServiceUnavailableError", None, "read-only")
    assert client.get(f"{ROOT}/facts/f1").status_code == 200


def _only_read(db: sqlite3.Connection) -> sqlite3.Connection:
    """SQLite's own switch: every write fails as in a folder that may not be written."""
    db.execute("PRAGMA query_only = ON")
    return db


def _without_room(db: sqlite3.Connection, pages: int) -> sqlite3.Connection:
    """SQLite's own limit: beyond it, every write fails as on a disk that is full."""
    db.execute(f"PRAGMA max_page_count = {pages}")
    return db


def test_the_same_key_again_is_answered_as_it_was_and_does_nothing(client: TestClient) -> None:
    for content, headers in (
        (json.dumps([fact(1)]).encode(), {"Content-Type": "application/json"}),
        (lines(fact(2), b"bad"), {"Content-Type": NDJSON}),
    ):
        headers |= {"Idempotency-Key": f"key of {headers['Content-Type']}"}
        first = client.put(f"{ROOT}/facts", content=content, headers=headers)
        client.post(f"{ROOT}/facts/delete", json={"ids": ["f1", "f2"]})
        again = client.put(f"{ROOT}/facts", content=content, headers=headers)
        assert (again.status_code, again.json()) == (first.status_code, first.json())
        assert "Idempotency-Replayed" not in first.headers and again.headers["Idempotency-Replayed"] == "true"
        assert count(client) == 0
        other = client.put(f"{ROOT}/facts", content=content + b" ", headers=headers)
        assert_refused(other, 422, UNPROCESSABLE, "Idempotency-Key", "another body")
    assert_refused(put_lines(client, b"", **{"Idempotency-Key": "k" * 256}), 422, UNPROCESSABLE, "Idempotency-Key")


def test_a_request_that_failed_for_the_disk_is_done_again_under_its_key(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = lines(*(fact(number, text="x" * 2000) for number in range(1000)))
    connect = database._connect
    db = client.app.state.polyhelm.kb._catalog._db  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(database, "_connect", lambda path: _without_room(connect(path), 200))
        db.close()
        assert put_lines(client, content, **{"Idempotency-Key": "k"}).status_code == 507
    answer = put_lines(client, content, **{"Idempotency-Key": "k"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["created"] + answer.json()["unchanged"] == 1000


def test_a_client_that_left_sends_all_of_it_again_under_its_key(client: TestClient) -> None:
    content = lines(*(fact(number) for number in range(3000)))
    assert client.portal is not None
    client.portal.call(_leave, client, content[: len(content) // 2], "k")
    written = count(client)
    assert 0 < written < 3000
    answer = put_lines(client, content, **{"Idempotency-Key": "k"})
    assert answer.status_code == 200, answer.text
    assert (answer.json()["unchanged"], answer.json()["created"]) == (written, 3000 - written)
    assert put_lines(client, content, **{"Idempotency-Key": "k"}).headers["Idempotency-Replayed"] == "true"


async def _leave(client: TestClient, content: bytes, key: str) -> None:
    """Send the beginning of a stream, and hang up."""
    messages = [{"type": "http.request", "body": content, "more_body": True}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        pass  # Nobody listens.

    headers = [(b"content-type", NDJSON.encode()), (b"idempotency-key", key.encode())]
    path = f"{ROOT}/facts"
    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "PUT", "scheme": "http"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers}
    await client.app(scope, receive, send)


def test_a_fact_of_a_megabyte_is_413_and_its_neighbours_are_written(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        client.put(ROOT)
        answer = put_lines(client, lines(fact(1), fact(2, text="x" * 1_000_000), fact(3, text="x" * 100_000)))
        assert answer.status_code == 413, answer.text
        (error,) = answer.json()["errors"]
        assert (error["line"], error["error"]["type"]) == (2, "RequestTooLarge")
        assert {each["id"] for each in client.get(f"{ROOT}/facts").json()["data"]} == {"f1", "f3"}
        alone = client.put(f"{ROOT}/facts", json=[fact(2, text="x" * 1_000_000)])
        assert alone.status_code == 413 and "131072" in alone.json()["error"]["message"]


def test_another_kind_of_body_is_refused(client: TestClient) -> None:
    answer = client.put(f"{ROOT}/facts", content=b"a,b", headers={"Content-Type": "text/csv"})
    assert_refused(answer, 415, "UnsupportedMediaType", "Content-Type", NDJSON)
    missing = client.put("/v1/kb/collections/none/facts", json=[fact(1)])
    assert_refused(missing, 404, "NotFoundError", "collection")


def test_ndjson_is_no_way_around_the_limit_of_other_routes(client: TestClient) -> None:
    answer = client.post(f"{ROOT}/facts/query", content=b" " * (1 << 21), headers={"Content-Type": NDJSON})
    assert answer.status_code == 413
    answer = client.put(f"{ROOT}/facts", content=b" " * (1 << 21), headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
