"""The knowledge base in the running server, with its own encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

ROOT = "/v1/kb/collections/e2e"
FACTS = [
    {"id": "mayor", "language": "en", "question": "Who is the mayor of Springfield?", "answer": "Joe Quimby"},
    {"id": "river", "language": "en", "question": "Which river flows through Vienna?", "answer": "the Danube"},
    {"id": "author", "language": "en", "question": "Who wrote the Odyssey?", "answer": "Homer"},
]


def test_facts_are_found_in_another_language_and_by_the_command_line_at_once(server: Server) -> None:
    made = server.client.put(ROOT)
    assert made.status_code == 201, made.text
    assert made.json()["encoder"] in server.capabilities["encoders"]
    written = server.client.put(f"{ROOT}/facts", json=FACTS)
    assert written.status_code == 200, written.text
    query = {"query": "Wer ist der Bürgermeister von Springfield?", "top_k": 1}
    (match,) = server.client.post(f"{ROOT}/facts/query", json=query).json()["data"]
    assert match["fact"]["id"] == "mayor" and 0.8 < match["score"] <= 1
    # A fact that another process writes into the same folder is found by the next request.
    line = json.dumps({"id": "capital", "question": "Quelle est la capitale du Pérou ?", "answer": "Lima"})
    command = [str(Path(sys.executable).with_name("polyhelm")), "kb", "import", "e2e", "-", "--json"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POLYHELM_")}
    environment["POLYHELM_DATA_DIR"] = str(server.data_dir)
    done = subprocess.run(command, input=line, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["created"] == 1
    query = {"query": "What is the capital of Peru?", "top_k": 1}
    (match,) = server.client.post(f"{ROOT}/facts/query", json=query).json()["data"]
    assert match["fact"]["id"] == "capital"
    assert server.client.delete(ROOT).status_code == 204


def test_a_stream_larger_than_any_body_is_taken_in_constant_memory(server: Server) -> None:
    collection = "/v1/kb/collections/stream"
    encoder = {"name": "given", "dimension": 8, "digest": "sha256:given"}
    assert server.client.put(collection, json={"encoder": encoder}).status_code == 201

    def lines(facts: int) -> Iterator[bytes]:
        for number in range(facts):
            fact = {"id": f"f{number}", "text": "x" * 10_000, "embedding": [1.0, number / 1000] + [0.5] * 6}
            yield json.dumps(fact).encode() + b"\n"

    def put(facts: int) -> None:
        headers = {"Content-Type": "application/x-ndjson"}
        answer = server.client.put(f"{collection}/facts", content=lines(facts), headers=headers)
        assert answer.status_code == 200, answer.text
        assert answer.json()["lines"] == facts

    put(1000)
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    # 90 MB, where a JSON body may have 16.
    put(9000)
    assert process.memory_info().rss - before < 40 << 20
    assert server.client.get(f"{collection}/stats").json()["facts"] == 9000
    assert server.client.delete(collection).status_code == 204
