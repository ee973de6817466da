"""LiteLLM's proxy with docker/litellm.yaml: whether `steering` and `knowledge` arrive at the server as they were sent.

Once before a server that keeps what reaches it, and once before polyhelm, by the official client: the receipts must
come back from a whole answer and from a stream, and an error must. Exits with 1 where they don't. LiteLLM pins packages
otherwise than vLLM and has its own environment:

    python3 -m venv litellm && litellm/bin/pip install 'litellm[proxy]==1.106.2'
    make serve    # in another terminal
    .venv/bin/python benchmarks/litellm_check.py --litellm litellm/bin/litellm
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from environment import environment
from openai import OpenAI

CONFIG = Path(__file__).parents[1] / "docker" / "litellm.yaml"
RESULTS = Path(__file__).parent / "results" / "litellm_check.json"
START_SECONDS = 180
MASTER_KEY = f"sk-{secrets.token_hex(32)}"
MODEL = "smollm2"
MESSAGES: Any = [{"role": "user", "content": "How was the film?"}]
STEERING = {"interventions": [{"artifact": "sentiment", "strength": 2.5, "apply": {"prompt_positions": [-1]}}]}
KNOWLEDGE = {"collection": "facts", "min_score": 0.5, "languages": ["sw", "de"]}


FACT = {"id": "evry", "question": "Who designed Évry Cathedral?", "answer": "Mario Gariazzo", "language": "en"}


class Recorder(BaseHTTPRequestHandler):
    """Answers as an OpenAI server does, and keeps the bodies."""

    bodies: list[dict[str, Any]] = []

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        message = {"role": "assistant", "content": "Good."}
        answer = {"id": "1", "object": "chat.completion", "created": 1, "model": MODEL}
        answer |= {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def proxy(program: Path, url: str) -> Iterator[str]:
    """LiteLLM before the server at `url`; yields its own address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {**os.environ, "POLYHELM_URL": f"{url}/v1", "POLYHELM_API_KEY": "unused"}
    # Else it asks the network for a table of prices, and waits.
    variables["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    # It doesn't start without one.
    variables["LITELLM_MASTER_KEY"] = MASTER_KEY
    command = [str(program), "--config", str(CONFIG), "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_until_live(address, process)
            yield address
        finally:
            process.terminate()
            process.wait(30)


def wait_until_live(address: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{address}/health/liveliness", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.5)
    raise SystemExit("LiteLLM doesn't start")


def arrived(program: Path) -> dict[str, Any]:
    """The fields as they reach a server behind LiteLLM."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Recorder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with proxy(program, f"http://127.0.0.1:{server.server_port}") as address, client(address) as openai:
        openai.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body={"steering": STEERING, "knowledge": KNOWLEDGE}
        )
    server.shutdown()
    (body,) = Recorder.bodies
    return body


def receipts(program: Path, url: str) -> dict[str, Any]:
    """How many tokens were touched according to the receipts that come back through LiteLLM, and whether errors do."""
    request: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    steering = {"interventions": [{"artifact": "sentiment", "strength": 2}]}
    collection = f"{url}/v1/kb/collections/through-litellm"
    for call, sent in ((collection, {}), (f"{collection}/facts", [FACT])):
        httpx.put(call, json=sent, trust_env=False, timeout=60).raise_for_status()
    question: Any = [{"role": "user", "content": "Who designed the Évry Cathedral?"}]
    with proxy(program, url) as address, client(address) as openai:
        knowing = openai.chat.completions.create(
            model=MODEL, messages=question, max_tokens=4, extra_body={"knowledge": {"collection": "through-litellm"}}
        )
        whole = openai.chat.completions.create(**request, extra_body={"steering": steering})
        chunks = list(openai.chat.completions.create(**request, stream=True, extra_body={"steering": steering}))
        unknown = {"interventions": [{"artifact": "no-such-artifact"}]}
        refused = openai.with_options(max_retries=0).chat.completions.with_raw_response
        try:
            status = refused.create(**request, extra_body={"steering": unknown}).status_code
        except Exception as error:
            status = getattr(error, "status_code", None)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    streamed = [found for chunk in chunks if (found := getattr(chunk, "steering", None))]
    return {
        "facts": [each["id"] for each in getattr(knowing, "knowledge", {"facts": []})["facts"]],
        "whole": touched(getattr(whole, "steering", None)),
        "stream": touched(streamed[-1] if streamed else None),
        "same_text": text == whole.choices[0].message.content,
        "status_of_an_unknown_artifact": status,
    }


def touched(receipt: dict[str, Any] | None) -> int | None:
    return (
        None
        if receipt is None
        else sum(each["tokens_touched"] + each["tokens_from_cache"] for each in receipt["applied"])
    )


def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key=MASTER_KEY, http_client=httpx.Client(trust_env=False), timeout=300)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--litellm", type=Path, required=True, help="the program of LiteLLM")
    arguments = parser.parse_args()
    body = arrived(arguments.litellm)
    version = subprocess.run([arguments.litellm, "--version"], capture_output=True, text=True).stdout.split()
    results: dict[str, Any] = {
        "environment": environment(),
        "litellm": version[-1] if version else None,
        "steering_untouched": body.get("steering") == STEERING,
        "knowledge_untouched": body.get("knowledge") == KNOWLEDGE,
        "receipts": receipts(arguments.litellm, arguments.url),
    }
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    told = results["receipts"]
    passed = results["steering_untouched"] and results["knowledge_untouched"] and told["same_text"]
    passed = passed and told["whole"] and told["stream"] == told["whole"] and told["facts"] == [FACT["id"]]
    return 0 if passed and told["status_of_an_unknown_artifact"] == 404 else 1


if __name__ == "__main__":
    sys.exit(main())
