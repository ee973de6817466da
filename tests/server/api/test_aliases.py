from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from fastapi.testclient import TestClient

from steering_store import Store
from tests.server.api.artifact_app import artifact_app, assert_refused, publish_versions

URL = "/v1/artifacts/mood/aliases/production"


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(artifact_app(store)) as client:
        publish_versions(client, 3)
        yield client


def test_alias_is_created_read_moved_and_deleted(client: TestClient) -> None:
    created = client.put(URL, json={"version": 1, "by": "ada", "reason": "first"}, headers={"If-None-Match": "*"})
    body = created.json()
    assert (created.status_code, body["id"], body["version"], body["by"]) == (201, "mood@production", 1, "ada")
    assert created.headers["etag"] == f'"{body["etag"]}"'
    read = client.get(URL)
    assert (read.json(), read.headers["etag"]) == (body, created.headers["etag"])
    moved = client.put(URL, json={"version": 2}, headers={"If-Match": created.headers["etag"]})
    assert (moved.status_code, moved.json()["version"]) == (200, 2)
    assert client.get("/v1/artifacts/mood/versions/production").json()["version"] == 2
    assert client.get("/v1/artifacts/mood/aliases").json()["data"] == [moved.json()]
    assert client.get("/v1/artifacts/mood").json()["aliases"] == [moved.json()]
    assert client.delete(URL, headers={"If-Match": moved.headers["etag"]}).status_code == 204
    assert client.get(URL).status_code == client.delete(URL).status_code == 404


def test_history_says_who_when_from_to_and_why(client: TestClient) -> None:
    client.put(URL, json={"version": 1, "by": "ada", "reason": "first"})
    client.put(URL, json={"version": 3})
    client.put(URL.replace("production", "staging"), json={"version": 2})
    client.delete(URL, params={"by": "bob", "reason": "unused"})
    entries = client.get("/v1/artifacts/mood/history", params={"alias": "production"}).json()["data"]
    fields = ("action", "from_version", "to_version", "by", "reason")
    assert [tuple(entry.get(field) for field in fields) for entry in entries] == [
        ("set_alias", None, 1, "ada", "first"),
        ("set_alias", 1, 3, None, None),
        ("delete_alias", 3, None, "bob", "unused"),
    ]
    assert all(entry["at"] for entry in entries)
    whole = client.get("/v1/artifacts/mood/history").json()
    assert [entry["action"] for entry in whole["data"]].count("publish") == 3
    assert (len(whole["data"]), whole["has_more"]) == (7, False)
    paged, page = [], {"last_id": 0, "has_more": True}
    while page["has_more"]:
        page = client.get("/v1/artifacts/mood/history", params={"after": page["last_id"], "limit": 3}).json()
        paged += page["data"]
    assert paged == whole["data"]


def test_aliases_are_paged(client: TestClient) -> None:
    for alias in ("c", "a", "b"):
        client.put(URL.replace("production", alias), json={"version": 1})
    first = client.get("/v1/artifacts/mood/aliases", params={"limit": 2}).json()
    assert ([each["alias"] for each in first["data"]], first["last_id"], first["has_more"]) == (["a", "b"], "b", True)
    rest = client.get("/v1/artifacts/mood/aliases", params={"limit": 2, "after": "b"}).json()
    assert ([each["alias"] for each in rest["data"]], rest["has_more"]) == (["c"], False)


def test_move_of_what_somebody_else_moved_is_412_and_tells_the_tag(client: TestClient) -> None:
    first = client.put(URL, json={"version": 1}).headers["etag"]
    second = client.put(URL, json={"version": 2}).headers["etag"]
    for response in (
        client.put(URL, json={"version": 3}, headers={"If-Match": first}),
        client.put(URL, json={"version": 3}, headers={"If-None-Match": "*"}),
        client.delete(URL, headers={"If-Match": first}),
    ):
        assert_refused(response, 412, "PreconditionFailedError", "alias", "version 2")
        assert response.headers["etag"] == second
    assert client.put(URL, json={"version": 3}, headers={"If-Match": f"{first}, {second}"}).status_code == 200
    assert client.put(URL, json={"version": 1}, headers={"If-Match": "*"}).status_code == 200


def test_condition_on_an_alias_that_is_not_there_is_412(client: TestClient) -> None:
    for condition in ("*", '"1-1"'):
        response = client.put(URL, json={"version": 1}, headers={"If-Match": condition})
        assert_refused(response, 412, "PreconditionFailedError", "alias")
        assert "etag" not in response.headers


def test_of_concurrent_moves_with_one_tag_one_wins(client: TestClient) -> None:
    etag = client.put(URL, json={"version": 1}).headers["etag"]

    def move(i: int) -> int:
        return client.put(URL, json={"version": 2 + i % 2}, headers={"If-Match": etag}).status_code

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(move, range(8))) == [200] + [412] * 7


def test_alias_to_a_yanked_or_missing_version_is_refused(client: TestClient) -> None:
    client.post("/v1/artifacts/mood/versions/2/yank")
    assert_refused(client.put(URL, json={"version": 2}), 409, "ConflictError", "version", "yanked")
    assert client.put(URL, json={"version": 9}).status_code == 404
    assert client.put(URL.replace("mood", "nobody"), json={"version": 1}).status_code == 404


@pytest.mark.parametrize(
    ("headers", "param"),
    [({"If-None-Match": '"x"'}, "If-None-Match"), ({"If-None-Match": "*", "If-Match": "*"}, "If-None-Match"),
     ({"If-Match": "3-17"}, "If-Match")],
)  # fmt: skip
def test_conditions_that_mean_nothing_are_400(client: TestClient, headers: dict[str, str], param: str) -> None:
    assert_refused(client.put(URL, json={"version": 1}, headers=headers), 400, "BadRequestError", param)


@pytest.mark.parametrize(
    ("alias", "body", "param"),
    [("latest", {"version": 1}, "alias"), ("7", {"version": 1}, "alias"), ("Live", {"version": 1}, "alias"),
     ("live", {}, "version"), ("live", {"version": 0}, "version"), ("live", {"version": 1, "to": 2}, "to")],
)  # fmt: skip
def test_malformed_alias_or_body_is_422(client: TestClient, alias: str, body: dict[str, int], param: str) -> None:
    response = client.put(f"/v1/artifacts/mood/aliases/{alias}", json=body)
    assert_refused(response, 422, "UnprocessableEntityError", param)
