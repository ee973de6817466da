"""Attacks on the running server: each is bounded, refused in the envelope, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import zlib
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from server.keys import FILE
from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

JSON = {"content-type": "application/json"}
POSTS = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/activations",
    "/v1/fits",
    "/tokenize",
    "/invocations",
    "/v1/artifacts/one/versions/1/yank",
    "/v1/kb/collections/attacked/facts/query",
    "/v1/kb/collections/attacked/facts/delete",
)
PUTS = ("/v1/artifacts/one/aliases/a", "/v1/kb/collections/attacked", "/v1/kb/collections/attacked/facts")
ROUTES = [*(("POST", path) for path in POSTS), *(("PUT", path) for path in PUTS)]
DEEP = b'{"id": ' + b"[" * 10_000 + b"]" * 10_000 + b"}"
UNREADABLE = (DEEP, b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b'{"model": "\xff\xfe"}')
MiB = 1 << 20


def raw(server: Server, sent: bytes) -> bytes:
    host, port = server.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as peer:
        peer.sendall(sent)
        answer = b""
        while part := peer.recv(65536):
            answer += part
        return answer


@pytest.fixture(scope="module", autouse=True)
def collection(server: Server) -> None:
    assert server.client.put("/v1/kb/collections/attacked").status_code in (200, 201)


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "content",
    [*UNREADABLE, json.dumps({"model": "smollm2", "steering": {"interventions": []}}).encode("utf-16")],
    ids=["deep list", "deep object", "not UTF-8", "UTF-16"],
)
def test_body_that_would_break_a_parser_is_400(server: Server, method: str, path: str, content: bytes) -> None:
    answer = server.client.request(method, path, content=content, headers=JSON)
    assert (answer.status_code, answer.json().keys()) == (400, {"error"})


@pytest.mark.parametrize("line", [*UNREADABLE, '{"text": "a"}'.encode("utf-16")[:-1], b"[" * 200_000, b"null", b'"'])
def test_line_that_would_break_a_parser_is_an_error_and_the_next_is_read(server: Server, line: bytes) -> None:
    good = json.dumps({"id": "good", "text": "a day"}).encode()
    content, headers = line.replace(b"\n", b"") + b"\n" + good, {"content-type": "application/x-ndjson"}
    answer = server.client.put("/v1/kb/collections/attacked/facts", content=content, headers=headers).json()
    assert (answer["failed"], answer["lines"], answer["created"] + answer["unchanged"]) == (1, 2, 1)
    assert 400 <= answer["error"]["code"] < 500


@pytest.mark.parametrize("manifest", UNREADABLE, ids=["deep list", "deep object", "not UTF-8"])
def test_manifest_that_would_break_a_parser_is_refused(server: Server, manifest: bytes) -> None:
    parts = {"manifest": ("manifest.json", manifest), "files": ("v.safetensors", b"x")}
    answer = server.client.post("/v1/artifacts/attacked/versions", files=parts)
    assert 400 <= answer.status_code < 500 and answer.json().keys() == {"error"}
    assert server.client.get("/v1/artifacts/attacked").status_code == 404


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_bomb_is_refused_unpacked(server: Server, coding: str) -> None:
    zeros = b'{"model": "' + b"0" * (200 * MiB)
    bomb = gzip.compress(zeros, 1) if coding == "gzip" else zlib.compress(zeros, 1)
    packed = {"content-encoding": coding}
    before = psutil.Process(server.process.pid).memory_info().rss
    for method, path in ROUTES:
        answer = server.client.request(method, path, content=bomb, headers=JSON | packed)
        assert answer.status_code == 415, path
    # What is read as a stream is read as it is.
    for method, path, kind in (
        ("PUT", "/v1/kb/collections/attacked/facts", "application/x-ndjson"),
        ("POST", "/v1/artifacts/attacked/versions", "multipart/form-data; boundary=x"),
    ):
        answer = server.client.request(method, path, content=bomb, headers={"content-type": kind} | packed)
        assert 400 <= answer.status_code < 500, path
    assert psutil.Process(server.process.pid).memory_info().rss - before < 100 * MiB


TRAVERSALS = ("..", "%2e%2e", "..%2f..%2f", "%2e%2e%2f%2e%2e%2f", "..%5c..%5c", "%2fetc%2f", "....//", "one%00")


@pytest.mark.parametrize("way", TRAVERSALS)
@pytest.mark.parametrize("target", [FILE, "passwd", "store.sqlite"])
def test_no_path_leads_out_of_the_store(server: Server, way: str, target: str) -> None:
    server.client.get("/readyz")
    assert (server.data_dir / FILE).is_file(), "what is looked for is there"
    for prefix in (
        "/v1/artifacts/one/versions/1/files/",
        "/v1/artifacts/one/versions/",
        "/v1/artifacts/",
        "/v1/fits/",
        "/static/",
    ):
        answer = raw(server, f"GET {prefix}{way}{target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        status = int(answer.split()[1])
        assert 400 <= status < 500 and status != 403, (prefix, answer[:200])
        assert b"SQLite format" not in answer and b"root:" not in answer


def test_no_file_is_written_outside_of_the_store(server: Server) -> None:
    before = {path for path in server.data_dir.parent.rglob("*") if "tmp" not in path.parts}
    for name in ("../x", "..%2fx", "/tmp/x", "a/../../x"):
        files = {name: b"x"}
        assert 400 <= server.send_artifact("escape", server.manifest(), files).status_code < 500
        answer = server.client.post(f"/v1/artifacts/{name}/versions", data={"manifest": "{}"}, files=[])
        assert 400 <= answer.status_code < 500
    new = {path for path in server.data_dir.parent.rglob("*") if "tmp" not in path.parts} - before
    assert not [path for path in new if path.name in ("x", "escape")]


class Listener:
    """Counts who connects."""

    def __init__(self) -> None:
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            connection.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


def test_no_request_makes_the_server_connect_anywhere(server: Server, listener: Listener) -> None:
    url = f"http://127.0.0.1:{listener.port}/x"
    with httpx.Client(trust_env=False) as client, pytest.raises(httpx.TransportError):
        client.get(url)
    assert listener.connections == 1, "it would be noticed"
    user = {"role": "user"}
    chats: list[dict[str, Any]] = [
        {"messages": [user | {"content": [{"type": kind, kind: {"url": url}}]}]}
        for kind in ("image_url", "audio_url", "video_url")
    ]
    chats += [{"messages": [user | {"content": "hi"}], field: url} for field in ("chat_template", "model", "user")]
    chats += [{"messages": [user | {"content": "hi"}], "kv_transfer_params": {"remote_host": "127.0.0.1", "url": url}}]
    for fields in chats:
        server.client.post("/v1/chat/completions", json={"model": server.model, "max_tokens": 1} | fields)
    tools = [{"type": "mcp", "server_label": "x", "server_url": url, "require_approval": "never"}]
    for extra in ({"tools": tools}, {"input": [user | {"content": [{"type": "input_image", "image_url": url}]}]}):
        sent = {"model": server.model, "input": "hi", "max_output_tokens": 4} | extra
        server.client.post("/v1/responses", json=sent)
    source = {"type": "url", "url": url}
    content = [{"type": "image", "source": source}]
    sent = {"model": server.model, "max_tokens": 1, "messages": [user | {"content": content}]}
    server.client.post("/v1/messages", json=sent)
    for reference in (url, f"s3://127.0.0.1:{listener.port}/x", f"one@{url}"):
        assert server.ask({"artifact": reference}).status_code == 422
    fit = {"method": "caa", "name": url, "pairs": [{"positive": url, "negative": url}] * 2}
    assert server.client.post("/v1/fits", json=fit).status_code == 422
    assert server.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": url}).status_code == 404
    assert listener.connections == 1


@pytest.mark.parametrize(
    "path",
    [
        "/v1/artifacts/one%0d%0aX-Injected:%201",
        "/v1/artifacts/one/versions/1/files/a%0d%0aX-Injected:%201",
        "/v1/artifacts/one/versions/1%0d%0aX-Injected:%201",
        "/v1/fits/x%0d%0aX-Injected:%201",
        "/v1/artifacts?after=%0d%0aX-Injected:%201&prefix=a",
        "/%0d%0aX-Injected:%201",
    ],
)
def test_no_header_is_made_of_what_was_sent(server: Server, path: str) -> None:
    lines = [f"GET {path} HTTP/1.1", "Host: x", "X-Request-Id: a%0d%0aX-Injected: 1", "Connection: close", "", ""]
    head, _, _ = raw(server, "\r\n".join(lines).encode()).partition(b"\r\n\r\n")
    names = [line.split(b":")[0].lower() for line in head.split(b"\r\n")[1:]]
    assert b"x-injected" not in names and names.count(b"x-request-id") == 1


def test_request_smuggled_behind_another_is_refused(server: Server) -> None:
    both = b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert raw(server, both + b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").startswith(
        b"HTTP/1.1 400"
    )
