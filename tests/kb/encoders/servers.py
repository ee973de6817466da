"""A real HTTP server that encodes with the embedded E5, by the protocols of TEI and OpenAI, and misbehaves if told."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kb.encoders import EmbeddedE5

MAX_BATCH = 4


@dataclass
class Behaviour:
    """`refusals` are the statuses of the next answers; `vectors`, where given, is answered for the true ones."""

    refusals: list[int] = field(default_factory=list)
    vectors: Any = None
    model_sha: str = "abc"
    raw: bytes | None = None
    batches: list[int] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)


@contextmanager
def encoder_server(behaviour: Behaviour) -> Iterator[str]:
    encoder = EmbeddedE5()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            info = {"model_id": "test/e5", "model_sha": behaviour.model_sha, "max_client_batch_size": MAX_BATCH}
            self.answer(200, info)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            behaviour.keys.add(self.headers.get("Authorization"))
            if behaviour.refusals:
                self.answer(behaviour.refusals.pop(0), {"error": "not now"})
                return
            texts = body["inputs"] if self.path == "/embed" else body["input"]
            behaviour.batches.append(len(texts))
            vectors = encoder.encode_queries(texts).tolist() if behaviour.vectors is None else behaviour.vectors
            if self.path == "/embed":
                self.answer(200, vectors)
            elif self.path == "/v1/embeddings":
                data = [{"index": index, "embedding": vector} for index, vector in enumerate(vectors)]
                self.answer(200, {"model": body["model"], "data": data[::-1]})
            else:
                self.answer(404, {"error": "no such path"})

        def answer(self, status: int, body: Any) -> None:
            content = json.dumps(body).encode() if behaviour.raw is None else behaviour.raw
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Retry-After", "0")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
