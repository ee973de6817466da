"""A local server that speaks what huggingface_hub asks of the hub, so that its client is the real one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """One repository, org/saes, of these files."""

    files: Mapping[str, bytes] = {}
    requested: list[str] = []

    def do_GET(self) -> None:
        self.answer(send=True)

    def do_HEAD(self) -> None:
        self.answer(send=False)

    def answer(self, *, send: bool) -> None:
        type(self).requested.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if path in ("/api/models/org/saes/revision/main", f"/api/models/org/saes/revision/{COMMIT}"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            siblings.append({"rfilename": "../../escape.json", "size": 1})
            body = json.dumps({"id": "org/saes", "sha": COMMIT, "siblings": siblings}).encode()
            self.reply(200, body, send, {"Content-Type": "application/json"})
        elif path.startswith(f"/org/saes/resolve/{COMMIT}/"):
            body = self.files[path.removeprefix(f"/org/saes/resolve/{COMMIT}/")]
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


@contextmanager
def serving(files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a hub with these files."""
    Hub.files, Hub.requested = files, []
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
