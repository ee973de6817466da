"""Against a local server that speaks what huggingface_hub asks of the hub; the client is the real one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steering_store.errors import ArtifactNotFound, InvalidReference, RemoteUnavailable, TooLarge
from steering_store.hub import HubSource, download, parse_source

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "README.md": b"# about",
    "model.bin": b"\x80\x04.",
    "layer_12/sae.safetensors": b"weights of 12",
    "layer_12/cfg.json": b"{}",
    "layer_13/sae.safetensors": b"weights of 13",
}


class Hub(BaseHTTPRequestHandler):
    requested: list[str] = []

    def do_GET(self) -> None:
        self.answer(send=True)

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def answer(self, *, send: bool) -> None:
        type(self).requested.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path in ("/api/models/org/saes/revision/main", f"/api/models/org/saes/revision/{COMMIT}"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in FILES.items()]
            siblings.append({"rfilename": "../../escape.json", "size": 1})
            body = json.dumps({"id": "org/saes", "sha": COMMIT, "siblings": siblings}).encode()
            self.reply(200, body, send, {"Content-Type": "application/json"})
        elif path.startswith(f"/org/saes/resolve/{COMMIT}/"):
            body = FILES[path.removeprefix(f"/org/saes/resolve/{COMMIT}/")]
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            self.reply(200, body, send, {"ETag": etag, "X-Repo-Commit": COMMIT})
        else:
            self.reply(404, b"{}", send, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such repository"})

    def reply(self, status: int, body: bytes, send: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if send:
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    Hub.requested = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_folder_is_downloaded_and_pinned_to_the_commit(endpoint: str, tmp_path: Path) -> None:
    source = parse_source("hf://org/saes@main/layer_12")
    snapshot = download(source, max_bytes=1000, endpoint=endpoint, cache=tmp_path)
    assert str(snapshot.source) == f"hf://org/saes@{COMMIT}/layer_12"
    assert snapshot.files == ("layer_12/cfg.json", "layer_12/sae.safetensors")
    assert (snapshot.location / "sae.safetensors").read_bytes() == b"weights of 12"
    assert {path.name for path in snapshot.location.iterdir()} == {"cfg.json", "sae.safetensors"}
    assert not any("layer_13" in each for each in Hub.requested)


def test_whole_repository_is_its_safe_files_only(endpoint: str, tmp_path: Path) -> None:
    snapshot = download(parse_source("hf://org/saes"), max_bytes=1000, endpoint=endpoint, cache=tmp_path)
    found = {str(path.relative_to(snapshot.location)) for path in snapshot.location.rglob("*") if path.is_file()}
    assert found == set(snapshot.files) == {name for name in FILES if not name.endswith((".md", ".bin"))}
    assert not any(word in each for each in Hub.requested for word in ("README", ".bin", "escape"))


def test_one_file_is_its_own_location(endpoint: str, tmp_path: Path) -> None:
    source = HubSource("org/saes", COMMIT, "layer_13/sae.safetensors")
    snapshot = download(source, max_bytes=1000, endpoint=endpoint, cache=tmp_path)
    assert snapshot.location.read_bytes() == b"weights of 13"


def test_more_than_the_limit_is_refused_before_any_file_is_asked_for(endpoint: str, tmp_path: Path) -> None:
    with pytest.raises(TooLarge, match="28 bytes, and at most 27"):
        download(parse_source("hf://org/saes"), max_bytes=27, endpoint=endpoint, cache=tmp_path)
    assert len(Hub.requested) == 1
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_named(endpoint: str, tmp_path: Path) -> None:
    for url in ("hf://org/nobody", "hf://org/saes/layer_99"):
        with pytest.raises(ArtifactNotFound, match=url.partition("//")[2].partition("/")[0]):
            download(parse_source(url), max_bytes=1000, endpoint=endpoint, cache=tmp_path)


def test_hub_that_does_not_answer_is_an_error_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(RemoteUnavailable, match="HF_ENDPOINT"):
        download(parse_source("hf://org/saes"), max_bytes=1000, endpoint="http://127.0.0.1:9", cache=tmp_path)


@pytest.mark.parametrize(
    "url",
    ["hf://saes", "hf://org/saes@", "hf://org/saes@a/../b", "hf://org/saes@main/..", "hf://../saes",
     "hf://org/saes@main//etc", "hf://org/saes@main/a\\..\\b", "http://org/saes"],
)  # fmt: skip
def test_malformed_sources_are_refused(url: str) -> None:
    with pytest.raises(InvalidReference):
        parse_source(url)
