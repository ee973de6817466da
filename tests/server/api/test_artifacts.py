from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx import Response
from safetensors.numpy import save

from server.api import errors
from server.api.artifacts import router
from steering_store import Store
from steering_store.errors import StoreBusy
from steering_store.manifest import MAX_MANIFEST_BYTES

FILE = "vectors.safetensors"
MAX_BYTES = 100_000
MANIFEST: dict[str, Any] = {
    "schema_version": 1,
    "kind": "steering_vector",
    "model": {"architecture": "LlamaForCausalLM", "hidden_size": 8, "num_layers": 4},
    "sites": [{"point": "resid_post", "layer": 2, "file": FILE, "tensor": "layer.2", "shape": [8], "dtype": "F32"}],
    "default_strength": 4.0,
    "provenance": {"method": "caa"},
}


def vector(fill: float = 1.0) -> bytes:
    return save({"layer.2": np.full(8, fill, np.float32)})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, max_files=2, max_bytes=MAX_BYTES)


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    app = FastAPI()
    app.state.polyhelm = SimpleNamespace(store=store)
    app.include_router(router)
    errors.install(app)
    with TestClient(app) as client:
        yield client


def publish(client: TestClient, name: str = "mood", manifest: Any = MANIFEST, **files: bytes) -> Any:
    parts = [("files", (path.replace("__", "."), content)) for path, content in files.items()] or [
        ("files", (FILE, vector()))
    ]
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    return client.post(f"/v1/artifacts/{name}/versions", data={"manifest": text}, files=parts)


def assert_refused(response: Response, status: int, kind: str, param: str | None, *words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"], error["param"]) == (status, status, kind, param)
    assert error.keys() == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]


def test_published_version_is_created_and_read_back(client: TestClient) -> None:
    response = publish(client)
    body = response.json()
    assert response.status_code == 201
    assert response.headers["location"] == "/v1/artifacts/mood/versions/1"
    assert response.headers["etag"] == f'"{body["digest"]}"'
    assert (body["id"], body["object"], body["version"]) == ("mood@1", "artifact.version", 1)
    assert body["manifest"]["files"][0]["sha256"] == hashlib.sha256(vector()).hexdigest()
    assert client.get(response.headers["location"]).json() == body


def test_digest_can_be_computed_from_the_manifest_in_the_answer(client: TestClient) -> None:
    body = publish(client, manifest=MANIFEST | {"description": "glücklich"}).json()
    text = json.dumps(body["manifest"], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert body["digest"] == "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def test_identical_republish_answers_200(client: TestClient) -> None:
    first, again = publish(client), publish(client)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json() == first.json()
    assert again.headers["location"] == first.headers["location"]
    assert publish(client, manifest=MANIFEST | {"default_strength": 5.0}).json()["version"] == 2


def test_manifest_may_be_a_file_part(client: TestClient) -> None:
    parts = {"manifest": ("m.json", json.dumps(MANIFEST).encode()), "vector": (FILE, vector())}
    assert client.post("/v1/artifacts/mood/versions", files=parts).status_code == 201


def test_upload_larger_than_the_memory_spool_is_stored(tmp_path: Path, client: TestClient) -> None:
    client.app.state.polyhelm.store = Store(tmp_path / "large")  # type: ignore[attr-defined]
    size = 600_000
    manifest = json.loads(json.dumps(MANIFEST))
    manifest["model"]["hidden_size"] = size
    manifest["sites"][0]["shape"] = [size]
    content = save({"layer.2": np.ones(size, np.float32)})
    assert publish(client, manifest=manifest, vectors__safetensors=content).status_code == 201
    assert client.get(f"/v1/artifacts/mood/versions/latest/files/{FILE}").content == content


def test_list_is_paged(client: TestClient) -> None:
    assert client.get("/v1/artifacts").json() == {
        "object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False
    }  # fmt: skip
    for name in ("a", "b", "c"):
        publish(client, name)
    page = client.get("/v1/artifacts", params={"limit": 2, "kind": "steering_vector"}).json()
    assert ([item["id"] for item in page["data"]], page["first_id"], page["last_id"], page["has_more"]) == (
        ["a", "b"], "a", "b", True
    )  # fmt: skip
    rest = client.get("/v1/artifacts", params={"after": page["last_id"]}).json()
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (["c"], False)


@pytest.mark.parametrize(("query", "param"), [("limit=0", "limit"), ("limit=x", "limit"), ("kind=lora", "kind")])
def test_bad_query_is_named_in_the_envelope(client: TestClient, query: str, param: str) -> None:
    assert_refused(client.get(f"/v1/artifacts?{query}"), 422, "UnprocessableEntityError", param, param)


def test_artifact_shows_its_versions_and_each_reference_finds_one(client: TestClient) -> None:
    first = publish(client).json()
    second = publish(client, vectors__safetensors=vector(2.0)).json()
    artifact = client.get("/v1/artifacts/mood").json()
    assert (artifact["object"], artifact["latest_version"]) == ("artifact", 2)
    assert artifact["versions"] == [first, second]
    for ref, expected in (("1", first), ("latest", second), (first["digest"], first)):
        assert client.get(f"/v1/artifacts/mood/versions/{ref}").json() == expected


def test_file_is_downloaded_with_validators_and_ranges(client: TestClient) -> None:
    publish(client)
    url = f"/v1/artifacts/mood/versions/1/files/{FILE}"
    whole = client.get(url)
    assert whole.content == vector()
    assert whole.headers["etag"] == f'"sha256:{hashlib.sha256(vector()).hexdigest()}"'
    assert "immutable" in whole.headers["cache-control"]
    assert "immutable" not in client.get(url.replace("/1/", "/latest/")).headers["cache-control"]
    part = client.get(url, headers={"Range": "bytes=8-15", "If-Range": whole.headers["etag"]})
    assert (part.status_code, part.content) == (206, vector()[8:16])
    assert client.get(url, headers={"If-None-Match": whole.headers["etag"]}).status_code == 304


@pytest.mark.parametrize(
    "path",
    ["/nobody", "/mood/versions/9", "/mood/versions/1/files/other.safetensors",
     "/mood/versions/1/files/..%2f..%2fstore.sqlite", "/mood/versions/1/files/%2fetc%2fpasswd"],
)  # fmt: skip
def test_what_does_not_exist_is_404(client: TestClient, path: str) -> None:
    publish(client)
    response = client.get("/v1/artifacts" + path)
    assert (response.status_code, response.json()["error"]["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize(
    ("path", "param"),
    [("/Mood", "name"), ("/a..b", "name"), ("/mood/versions/x", "ref"), ("/mood/versions/0", "ref"),
     ("/mood/versions/1@2", "ref")],
)  # fmt: skip
def test_malformed_name_or_reference_is_422(client: TestClient, path: str, param: str) -> None:
    assert_refused(client.get("/v1/artifacts" + path), 422, "UnprocessableEntityError", param)


@pytest.mark.parametrize("name", ["..%2fescape", "%2e%2e", "A", "a%00"])
def test_publishing_under_a_bad_name_creates_nothing(client: TestClient, tmp_path: Path, name: str) -> None:
    before = set(tmp_path.parent.iterdir())
    assert publish(client, name).status_code in (404, 405, 422)
    assert client.get("/v1/artifacts").json()["data"] == []
    assert set(tmp_path.parent.iterdir()) == before


@pytest.mark.parametrize("path", ["vectors__pt", "vectors__bin", "vectors__pkl"])
def test_pickle_is_415_with_the_remedy(client: TestClient, path: str) -> None:
    response = publish(client, **{path: b"\x80\x04."})
    assert_refused(response, 415, "UnsupportedMediaType", "files", "pickle", "save_file")


def test_pickle_named_safetensors_is_415(client: TestClient) -> None:
    response = publish(client, vectors__safetensors=b"PK\x03\x04" + b"\x08" * 60)
    assert_refused(response, 415, "UnsupportedMediaType", "files", "pickle")


def test_body_that_is_not_multipart_is_415(client: TestClient) -> None:
    response = client.post("/v1/artifacts/mood/versions", json=MANIFEST)
    assert_refused(response, 415, "UnsupportedMediaType", None, "multipart/form-data")


def test_traversal_in_a_file_name_is_422(client: TestClient) -> None:
    parts = [("files", ("../../escape.safetensors", vector()))]
    response = client.post("/v1/artifacts/mood/versions", data={"manifest": json.dumps(MANIFEST)}, files=parts)
    assert_refused(response, 422, "UnprocessableEntityError", "files", "escape")


def test_oversized_files_are_413(client: TestClient) -> None:
    assert_refused(publish(client, vectors__safetensors=b"\0" * (MAX_BYTES + 1)), 413, "RequestTooLarge", "files")


@pytest.mark.parametrize("count", [3, 6])
def test_too_many_files_are_413(client: TestClient, count: int) -> None:
    files = {f"v{i}__safetensors": vector() for i in range(count)}
    assert publish(client, **files).status_code == 413


def test_oversized_body_is_413_with_or_without_a_length(client: TestClient, tmp_path: Path) -> None:
    piece = b"\0" * (1 << 16)
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="v.safetensors"\r\n\r\n'
    body = head + piece * 40
    headers = {"content-type": "multipart/form-data; boundary=x"}
    for content, word in ((body, str(len(body))), (iter([head, *[piece] * 40]), "more than")):
        response = client.post("/v1/artifacts/mood/versions", content=content, headers=headers)
        assert_refused(response, 413, "RequestTooLarge", "files", word)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_oversized_manifest_is_413(client: TestClient) -> None:
    text = json.dumps(MANIFEST | {"description": "x" * MAX_MANIFEST_BYTES})
    assert publish(client, manifest=text).status_code == 413
    parts = {"manifest": ("m.json", text.encode()), "vector": (FILE, vector())}
    assert client.post("/v1/artifacts/mood/versions", files=parts).status_code == 413


def test_invalid_manifest_is_422_and_names_the_field(client: TestClient) -> None:
    response = publish(client, manifest=MANIFEST | {"default_strength": "strong"})
    assert_refused(response, 422, "UnprocessableEntityError", "default_strength", "default_strength")
    assert publish(client, manifest="{").json()["error"]["param"] == "manifest"


@pytest.mark.parametrize(
    ("content", "param", "word"),
    [
        (vector(float("nan")), "files", "layer.2"),
        (vector()[:-1], "files", "truncated"),
        (save({"layer.2": np.ones(16, np.float32)}), "sites.0.shape", "[16]"),
        (save({"layer.2": np.ones(8, np.float64)}), "sites.0.dtype", "F64"),
    ],
)
def test_invalid_tensor_is_422_and_says_why(client: TestClient, content: bytes, param: str, word: str) -> None:
    response = publish(client, vectors__safetensors=content)
    assert_refused(response, 422, "UnprocessableEntityError", param, word)
    assert client.get("/v1/artifacts").json()["data"] == []


def test_missing_repeated_or_stray_parts_are_422(client: TestClient) -> None:
    url = "/v1/artifacts/mood/versions"
    one, text = ("files", (FILE, vector())), json.dumps(MANIFEST)
    assert_refused(client.post(url, files=[one]), 422, "UnprocessableEntityError", "manifest", "send one")
    twice = client.post(url, data={"manifest": text}, files=[one, one])
    assert_refused(twice, 422, "UnprocessableEntityError", "files", "twice")
    stray = client.post(url, data={"manifest": text, "note": "x"}, files=[one])
    assert_refused(stray, 422, "UnprocessableEntityError", "note")


@pytest.mark.parametrize(
    ("header", "body"),
    [("multipart/form-data", b"x"), ("multipart/form-data; boundary=x", b"nonsense")],
)
def test_malformed_multipart_is_400(client: TestClient, header: str, body: bytes) -> None:
    response = client.post("/v1/artifacts/mood/versions", content=body, headers={"content-type": header})
    assert_refused(response, 400, "BadRequestError", None, "multipart")


def test_corrupt_file_is_500_and_none_of_it_is_sent(client: TestClient, store: Store) -> None:
    publish(client)
    store.file_path(store.resolve("mood"), FILE).write_bytes(vector(9.0))
    response = client.get(f"/v1/artifacts/mood/versions/1/files/{FILE}")
    assert_refused(response, 500, "InternalServerError", FILE, FILE)


def test_busy_store_is_503_with_retry_after(client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*args: object) -> None:
        raise StoreBusy("locked; try again")

    monkeypatch.setattr(store, "resolve", busy)
    response = client.get("/v1/artifacts/mood/versions/1")
    assert_refused(response, 503, "ServiceUnavailableError", None)
    assert response.headers["retry-after"] == "1"


def test_operation_ids_are_readable(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {operation["operationId"] for path in paths.values() for operation in path.values()} == {
        "list_artifacts", "get_artifact", "get_artifact_version", "download_artifact_file", "publish_artifact_version"
    }  # fmt: skip
