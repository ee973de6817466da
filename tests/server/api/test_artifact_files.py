from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator

import pytest
from fastapi.testclient import TestClient

from steering_store import Store
from tests.server.api.artifact_app import FILE, artifact_app, assert_refused, publish, vector

URL = f"/v1/artifacts/mood/versions/1/files/{FILE}"
DATA = vector()
ETAG = f'"sha256:{hashlib.sha256(DATA).hexdigest()}"'


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(artifact_app(store)) as client:
        publish(client)
        yield client


def test_file_comes_with_its_digest_and_may_be_kept_for_ever(client: TestClient) -> None:
    whole = client.get(URL)
    assert (whole.status_code, whole.content, whole.headers["etag"]) == (200, DATA, ETAG)
    digest = base64.b64encode(hashlib.sha256(DATA).digest()).decode()
    assert whole.headers["repr-digest"] == f"sha-256=:{digest}:"
    assert "immutable" in whole.headers["cache-control"]
    assert whole.headers["accept-ranges"] == "bytes"


def test_what_a_movable_reference_leads_to_is_revalidated(client: TestClient) -> None:
    client.put("/v1/artifacts/mood/aliases/production", json={"version": 1})
    digest = client.get("/v1/artifacts/mood/versions/1").json()["digest"]
    for ref, control in (
        ("latest", "no-cache"),
        ("production", "no-cache"),
        (digest, "public, max-age=31536000, immutable"),
    ):
        response = client.get(URL.replace("/1/", f"/{ref}/"))
        assert (response.content, response.headers["cache-control"]) == (DATA, control)


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("8-15", 8, 16), ("-4", len(DATA) - 4, len(DATA)), ("100-", 100, len(DATA)), (f"4-{1 << 40}", 4, len(DATA))],
)
def test_range_is_206(client: TestClient, asked: str, start: int, end: int) -> None:
    response = client.get(URL, headers={"Range": f"bytes={asked}", "If-Range": ETAG})
    assert (response.status_code, response.content) == (206, DATA[start:end])
    assert response.headers["content-range"] == f"bytes {start}-{end - 1}/{len(DATA)}"
    assert response.headers["repr-digest"] == client.get(URL).headers["repr-digest"]


def test_range_of_another_file_than_the_client_has_is_answered_whole(client: TestClient) -> None:
    response = client.get(URL, headers={"Range": "bytes=0-3", "If-Range": '"sha256:other"'})
    assert (response.status_code, response.content) == (200, DATA)


def test_several_ranges_come_as_parts(client: TestClient) -> None:
    response = client.get(URL, headers={"Range": "bytes=0-3,8-11"})
    assert response.status_code == 206
    assert response.headers["content-type"].startswith("multipart/byteranges")
    assert DATA[:4] in response.content and DATA[8:12] in response.content


def test_range_outside_the_file_is_416_in_the_envelope(client: TestClient) -> None:
    response = client.get(URL, headers={"Range": f"bytes={len(DATA)}-"})
    assert_refused(response, 416, "RangeNotSatisfiableError", "Range")
    assert response.headers["content-range"] == f"bytes */{len(DATA)}"
    assert_refused(client.get(URL, headers={"Range": "lines=1"}), 400, "BadRequestError", "Range")


@pytest.mark.parametrize("seen", [ETAG, f'"other", {ETAG}', f"W/{ETAG}", "*"])
def test_known_file_is_304_unread(client: TestClient, store: Store, seen: str) -> None:
    store.file_path(store.resolve("mood"), FILE).unlink()
    response = client.get(URL, headers={"If-None-Match": seen})
    assert (response.status_code, response.content, response.headers["etag"]) == (304, b"", ETAG)


def test_tag_that_only_contains_the_right_one_is_another(client: TestClient) -> None:
    assert client.get(URL, headers={"If-None-Match": f'"x{ETAG[1:]}'}).status_code == 200
    assert_refused(client.get(URL, headers={"If-None-Match": ETAG[1:-1]}), 400, "BadRequestError", "If-None-Match")


def test_corrupt_file_is_500_and_none_of_it_is_sent(client: TestClient, store: Store) -> None:
    store.file_path(store.resolve("mood"), FILE).write_bytes(vector(9.0))
    assert_refused(client.get(URL), 500, "InternalServerError", FILE, FILE)
    assert_refused(client.get(URL, headers={"Range": "bytes=0-3"}), 500, "InternalServerError", FILE)
