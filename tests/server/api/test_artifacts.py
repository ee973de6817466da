from __future__ import annotations

import asyncio
import hashlib
import json
import sqlite3
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from safetensors.numpy import save
from starlette.types import Message

from steering_store import Store
from steering_store.errors import StoreBusy
from steering_store.manifest import MAX_MANIFEST_BYTES
from tests.server.api.artifact_app import (
    FILE,
    MANIFEST,
    artifact_app,
    assert_refused,
    publish,
    publish_versions,
    vector,
)

MAX_BYTES = 100_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path, max_files=2, max_bytes=MAX_BYTES)


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(artifact_app(store)) as client:
        yield client


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


def test_upload_is_never_whole_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to the app message by message: the test client would hold the body itself. There is no temporary folder,
    which in a container is memory: what comes lies in the store's, once."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    size = 16_000_000
    manifest = json.loads(json.dumps(MANIFEST))
    manifest["model"]["hidden_size"] = size
    manifest["sites"][0]["shape"] = [size]
    header = json.dumps({"layer.2": {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}}).encode()
    piece = np.ones(250_000, np.float32).tobytes()

    def body() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="manifest"\r\n\r\n' + json.dumps(manifest).encode()
        yield b'\r\n--x\r\nContent-Disposition: form-data; name="f"; filename="%s"\r\n\r\n' % FILE.encode()
        yield len(header).to_bytes(8, "little") + header
        yield from [piece] * 64
        yield b"\r\n--x--\r\n"

    store = Store(tmp_path / "large")
    app = artifact_app(store)
    pieces, sent = body(), []

    on_the_disk: list[int] = []

    async def receive() -> Message:
        on_the_disk.append(sum(path.stat().st_size for path in (tmp_path / "large" / "tmp").iterdir()))
        return {"type": "http.request", "body": next(pieces, b""), "more_body": True}

    async def finite() -> Message:
        message = await receive()
        return message | {"more_body": bool(message["body"])}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    path = "/v1/artifacts/large/versions"
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
             "headers": headers, "scheme": "http", "server": ("test", 80), "http_version": "1.1"}  # fmt: skip
    tracemalloc.start()
    try:
        asyncio.run(app(scope, finite, send))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sent[0]["status"] == 201, sent
    assert store.resolve("large").manifest.files[0].size == 8 + len(header) + 64_000_000
    assert peak < 40_000_000
    assert 60_000_000 < max(on_the_disk) < 65_000_000
    assert list((tmp_path / "large" / "tmp").iterdir()) == []


def test_refused_upload_leaves_nothing_behind(client: TestClient, tmp_path: Path) -> None:
    for status, answer in (
        (413, publish(client, vectors__safetensors=b"x" * 2 * MAX_BYTES)),
        (413, publish(client, **{f"f{i}__safetensors": b"x" for i in range(9)})),
        (422, publish(client, vectors__safetensors=b"x")),
        (422, publish(client, manifest="{}")),
        (200, publish(client) and publish(client)),
    ):
        assert answer.status_code == status
        assert list((tmp_path / "tmp").iterdir()) == []


def test_full_disk_is_said_while_the_upload_comes(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to /dev/full stands for the file: the kernel itself says that there is no room."""
    open_file = Path.open

    def full(path: Path, mode: str = "r", **options: Any) -> Any:
        if mode == "x+b":
            path.symlink_to("/dev/full")
            mode = "r+b"
        return open_file(path, mode, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        refused = publish(client, vectors__safetensors=b"x" * 50_000)
    assert_refused(refused, 507, "InsufficientStorageError", None, "disk is full")
    assert publish(client).status_code == 201


def test_list_is_paged(client: TestClient) -> None:
    assert client.get("/v1/artifacts").json() == {
        "object": "list", "data": [], "damaged": [], "first_id": None, "last_id": None, "has_more": False
    }  # fmt: skip
    for name in ("a", "b", "c"):
        publish(client, name)
    page = client.get("/v1/artifacts", params={"limit": 2, "kind": "steering_vector"}).json()
    assert ([item["id"] for item in page["data"]], page["first_id"], page["last_id"], page["has_more"]) == (
        ["a", "b"], "a", "b", True
    )  # fmt: skip
    rest = client.get("/v1/artifacts", params={"after": page["last_id"]}).json()
    assert ([item["id"] for item in rest["data"]], rest["has_more"]) == (["c"], False)


def test_versions_are_paged(client: TestClient) -> None:
    publish_versions(client, 5)
    client.post("/v1/artifacts/mood/versions/3/yank")
    for number in range(1, 5):
        client.put(f"/v1/artifacts/mood/aliases/a{number}", json={"version": 1})
    seen: list[int] = []
    page: dict[str, Any] = {"last_version": 0, "has_more": True}
    while page["has_more"]:
        page = client.get("/v1/artifacts/mood", params={"limit": 2, "after": page["last_version"]}).json()
        seen += [each["version"] for each in page["versions"]]
        assert (page["latest_version"], len(page["aliases"]), page["more_aliases"]) == (5, 2, True)
    assert seen == [1, 2, 3, 4, 5]
    behind = client.get("/v1/artifacts/mood", params={"after": 5}).json()
    assert (behind["versions"], behind["has_more"], behind["latest_version"]) == ([], False, 5)
    for query in ("limit=101", "after=-1", f"after={1 << 63}"):
        assert client.get(f"/v1/artifacts/mood?{query}").status_code == 422


def test_damaged_version_is_named_and_hides_no_other(client: TestClient, tmp_path: Path) -> None:
    for name in ("a", "mood", "z"):
        publish_versions(client, 2, name)
    with sqlite3.connect(tmp_path / "store.sqlite") as db:
        db.execute("UPDATE versions SET manifest = 'x' || manifest WHERE name = 'mood' AND version = 2")
        db.execute("UPDATE versions SET manifest = replace(manifest, 'caa', 'CAA') WHERE name = 'z'")
    for query in ({}, {"model": "LlamaForCausalLM"}):
        listed = client.get("/v1/artifacts", params=query).json()
        assert [each["id"] for each in listed["data"]] == ["a"]
        assert [each["id"] for each in listed["damaged"]] == ["mood@2", "z@2"]
        assert "restore the database" in listed["damaged"][0]["message"]
        assert listed["last_id"] == "z"
    pages = [client.get("/v1/artifacts", params={"limit": 1, "after": after}).json() for after in ("", "a", "mood")]
    assert [(page["last_id"], page["has_more"]) for page in pages] == [("a", True), ("mood", True), ("z", False)]
    mood = client.get("/v1/artifacts/mood").json()
    assert ([each["version"] for each in mood["versions"]], mood["latest_version"]) == ([1], 1)
    assert ([each["id"] for each in mood["damaged"]], mood["last_version"]) == (["mood@2"], 2)
    for path in ("mood/versions/2", "mood/versions/latest", "z", f"mood/versions/2/files/{FILE}"):
        assert_refused(client.get(f"/v1/artifacts/{path}"), 500, "InternalServerError", "manifest", "digest")
    assert client.get("/v1/artifacts/mood/versions/1").status_code == 200


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
    [("/Mood", "name"), ("/a..b", "name"), ("/mood/versions/X", "ref"), ("/mood/versions/0", "ref"),
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
    assert_refused(response, 415, "UnsupportedMediaType", "files", "pickle", "polyhelm artifact convert")


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


def test_busy_store_is_503_with_retry_after(client: TestClient, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*args: object) -> None:
        raise StoreBusy("locked; try again")

    monkeypatch.setattr(store, "resolve", busy)
    response = client.get("/v1/artifacts/mood/versions/1")
    assert_refused(response, 503, "ServiceUnavailableError", None)
    assert response.headers["retry-after"] == "1"


def test_list_is_filtered_by_model_kind_and_prefix(client: TestClient) -> None:
    other = MANIFEST | {"model": MANIFEST["model"] | {"name": "smollm2"}}
    for name in ("a", "mo", "mood", "mood-2", "moody", "mop", "z"):
        publish(client, name, MANIFEST if name == "mop" else other)

    def names(**query: Any) -> tuple[list[str], bool]:
        page = client.get("/v1/artifacts", params=query).json()
        return [item["id"] for item in page["data"]], page["has_more"]

    assert names(prefix="mood") == (["mood", "mood-2", "moody"], False)
    assert names(prefix="mood", limit=2) == (["mood", "mood-2"], True)
    assert names(prefix="mood", limit=2, after="mood-2") == (["moody"], False)
    assert names(prefix="mood", limit=3) == (["mood", "mood-2", "moody"], False)
    assert names(prefix="mo", model="smollm2", kind="steering_vector") == (["mo", "mood", "mood-2", "moody"], False)
    assert names(model="LlamaForCausalLM")[0] == ["a", "mo", "mood", "mood-2", "moody", "mop", "z"]
    assert names(prefix="x") == names(kind="sae") == names(model="other") == ([], False)
    assert_refused(client.get("/v1/artifacts?prefix=%25"), 422, "UnprocessableEntityError", "prefix")


def test_schema_of_the_manifest_is_served_and_takes_what_is_published(client: TestClient) -> None:
    schema = client.get("/v1/artifacts/schema").json()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(MANIFEST) <= set(schema["properties"])


def test_version_is_revalidated_and_a_yank_changes_its_tag(client: TestClient) -> None:
    publish(client)
    url = "/v1/artifacts/mood/versions/1"
    first = client.get(url)
    assert first.headers["etag"] == f'"{first.json()["digest"]}"'
    assert first.headers["cache-control"] == "no-cache"
    known = {"If-None-Match": first.headers["etag"]}
    again = client.get(url, headers=known)
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    client.post(url + "/yank")
    assert client.get(url, headers=known).json()["yanked"]


def test_yanked_version_is_hidden_but_found_by_number_and_digest(client: TestClient) -> None:
    publish_versions(client, 2)
    response = client.post("/v1/artifacts/mood/versions/2/yank", json={"by": "ada", "reason": "too strong"})
    assert (response.status_code, response.json()["yanked"]) == (200, True)
    assert response.json()["yank_reason"] == "too strong"
    assert client.get("/v1/artifacts/mood/versions/latest").json()["version"] == 1
    assert client.get("/v1/artifacts").json()["data"][0]["latest_version"] == 1
    for ref in ("2", response.json()["digest"]):
        assert client.get(f"/v1/artifacts/mood/versions/{ref}").json()["version"] == 2
    artifact = client.get("/v1/artifacts/mood").json()
    assert (artifact["latest_version"], [each["yanked"] for each in artifact["versions"]]) == (1, [False, True])
    assert client.post("/v1/artifacts/mood/versions/2/unyank").json()["yanked"] is False
    assert client.get("/v1/artifacts/mood/versions/latest").json()["version"] == 2
    history = client.get("/v1/artifacts/mood/history").json()["data"]
    assert [(entry["action"], entry.get("from_version"), entry.get("by")) for entry in history] == [
        ("publish", None, None), ("publish", None, None), ("yank", 2, "ada"), ("unyank", 2, None)
    ]  # fmt: skip


def test_deleted_version_is_gone_and_its_number_is_not_given_again(client: TestClient) -> None:
    publish_versions(client, 2)
    assert client.delete("/v1/artifacts/mood/versions/2", params={"reason": "a mistake"}).status_code == 204
    assert client.get("/v1/artifacts/mood/versions/2").status_code == 404
    assert client.delete("/v1/artifacts/mood/versions/2").status_code == 404
    assert publish(client, vectors__safetensors=vector(9)).json()["version"] == 3
    history = client.get("/v1/artifacts/mood/history").json()["data"]
    assert [entry.get("reason") for entry in history if entry["action"] == "delete"] == ["a mistake"]


def test_version_that_is_needed_is_not_deleted(client: TestClient, store: Store) -> None:
    digest = publish(client).json()["digest"]
    url = "/v1/artifacts/mood/versions/1"
    client.put("/v1/artifacts/mood/aliases/production", json={"version": 1})
    assert_refused(client.delete(url), 409, "ConflictError", "version", "alias production")
    client.delete("/v1/artifacts/mood/aliases/production")
    store.lease(digest, "request 7", 60)
    assert_refused(client.delete(url), 409, "ConflictError", "version", "request 7")
    store.release("request 7")
    preset = {key: MANIFEST[key] for key in ("schema_version", "model", "default_strength", "provenance")}
    preset |= {"kind": "preset", "interventions": [{"artifact": "mood"}]}
    sent = {"manifest": ("m.json", json.dumps(preset).encode())}
    assert client.post("/v1/artifacts/cheer/versions", files=sent).status_code == 201
    assert_refused(client.delete(url), 409, "ConflictError", "version", "preset cheer@1")
    client.delete("/v1/artifacts/cheer/versions/1")
    assert client.delete(url).status_code == 204


def test_publishing_on_condition_that_it_is_new(client: TestClient) -> None:
    new = {"If-None-Match": "*"}
    assert publish(client, headers=new).status_code == 201
    assert_refused(publish(client, headers=new), 412, "PreconditionFailedError", "manifest", "mood@1")


@pytest.mark.parametrize("path", ["yank", "unyank"])
def test_change_to_a_version_that_is_not_there_is_404_and_a_bad_body_422(client: TestClient, path: str) -> None:
    publish(client)
    assert client.post(f"/v1/artifacts/mood/versions/9/{path}").status_code == 404
    url = f"/v1/artifacts/mood/versions/1/{path}"
    assert_refused(client.post(url, json={"because": "x"}), 422, "UnprocessableEntityError", "because")
    assert_refused(client.post(url, json={"reason": "x" * 1001}), 422, "UnprocessableEntityError", "reason")
    assert_refused(client.post(url.replace("/1/", "/x/")), 422, "UnprocessableEntityError", "version")


def test_operation_ids_are_readable(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert {operation["operationId"] for path in paths.values() for operation in path.values()} == {
        "list_artifacts", "get_manifest_schema", "get_artifact", "get_artifact_version", "publish_artifact_version",
        "delete_artifact_version", "yank_artifact_version", "unyank_artifact_version", "download_artifact_file",
        "list_aliases", "get_alias", "set_alias", "delete_alias", "get_history",
    }  # fmt: skip
