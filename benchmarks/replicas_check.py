"""Two replicas with one store: what one publishes and where its aliases point, the other knows within the stated bound.

And vllm-router before both: steered answers come through it, whole and as a stream, from both replicas. Start them, and
install the router in an environment of its own, with one folder or bucket as STORE:

    polyhelm serve --data-dir one --store STORE --port 8001
    polyhelm serve --data-dir two --store STORE --port 8002
    python3 -m venv router && router/bin/pip install vllm-router==0.1.17
    .venv/bin/python benchmarks/replicas_check.py --router router/bin/vllm-router
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from environment import environment
from safetensors.numpy import save
from spread import spread

RESULTS = Path(__file__).parent / "results" / "replicas_check.json"
MOVES, REQUESTS, START_SECONDS = 10, 24, 120
BOUND_SECONDS = 10 + 2
"""POLYHELM_STORE_REFRESH_SECONDS, and some for the listing of the store and for the request that sees it."""


def publish(client: httpx.Client, name: str, seed: int) -> httpx.Response:
    capabilities = client.get("/v1/capabilities").json()
    hidden = capabilities["hidden_size"]
    vector = np.random.default_rng(seed).standard_normal(hidden).astype(np.float32)
    keys = ("architecture", "hidden_size", "num_layers", "weights_digest", "tokenizer_digest")
    site = {
        "point": "resid_post",
        "layer": 12,
        "file": "v.safetensors",
        "tensor": "v",
        "shape": [hidden],
        "dtype": "F32",
    }
    manifest = {
        "schema_version": 1,
        "kind": "steering_vector",
        "model": {key: capabilities["model"][key] for key in keys},
        "sites": [site],
        "default_strength": 1.0,
        "provenance": {"method": "random"},
    }
    return client.post(
        f"/v1/artifacts/{name}/versions",
        data={"manifest": json.dumps(manifest)},
        files=[("files", ("v.safetensors", save({"v": vector})))],
    )


def body(model: str, reference: str, **fields: Any) -> dict[str, Any]:
    steering = {"interventions": [{"artifact": reference, "strength": 1.0}]}
    return {"model": model, "prompt": uuid.uuid4().hex, "max_tokens": 4, "steering": steering} | fields


def used(client: httpx.Client, model: str, reference: str) -> int:
    """The version that a steered request used, by its receipt."""
    answer = client.post("/v1/completions", json=body(model, reference))
    answer.raise_for_status()
    version: int = answer.json()["steering"]["applied"][0]["version"]
    return version


def shared_store(one: httpx.Client, two: httpx.Client, model: str) -> dict[str, Any]:
    name = f"replicas-{uuid.uuid4().hex[:8]}"
    publish(one, name, 1).raise_for_status()
    started = time.perf_counter()
    assert used(two, model, f"{name}@1") == 1
    found = time.perf_counter() - started
    publish(one, name, 2).raise_for_status()
    delays = []
    for move in range(MOVES):
        version = 1 + move % 2
        one.put(f"/v1/artifacts/{name}/aliases/production", json={"version": version}).raise_for_status()
        started = time.perf_counter()
        while move and used(two, model, f"{name}@production") != version:
            time.sleep(0.1)
        used(two, model, f"{name}@production")  # the first is found at once, as everything that is new
        if move:
            delays.append(time.perf_counter() - started)
    return {"first_use_of_a_new_version_s": found, "alias_seconds": spread(delays), "alias_seconds_most": max(delays)}


@contextmanager
def router(program: Path, urls: list[str]) -> Iterator[str]:
    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, metrics = probe.getsockname()[1], other.getsockname()[1]
    command = [str(program), "--worker-urls", *urls, "--policy", "round_robin", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--prometheus-port", str(metrics)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while time.monotonic() < deadline and process.poll() is None:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            else:
                log.seek(0)
                raise SystemExit(f"the router doesn't start: {log.read()[-2000:].decode('utf-8', 'replace')}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def served(client: httpx.Client) -> float:
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith("vllm:request_success_total{"))


def through_the_router(address: str, replicas: list[httpx.Client], model: str) -> dict[str, Any]:
    before = [served(replica) for replica in replicas]
    with httpx.Client(base_url=address, timeout=300, trust_env=False) as client:
        name = f"routed-{uuid.uuid4().hex[:8]}"
        publish(replicas[0], name, 3).raise_for_status()
        versions = [used(client, model, name) for _ in range(REQUESTS)]
        reads, whole = 0, b""
        with client.stream("POST", "/v1/completions", json=body(model, name, stream=True, max_tokens=16)) as answer:
            for part in answer.iter_raw():
                reads, whole = reads + 1, whole + part
        refused = client.post("/v1/completions", json=body(model, "no-such-artifact"))
    after = [served(replica) for replica in replicas]
    return {
        "steered": versions == [1] * REQUESTS,
        "answers_of_each": [end - begin for begin, end in zip(before, after, strict=True)],
        "stream_reads": reads,
        "stream_has_the_receipt": b'"fingerprint"' in whole and whole.rstrip().endswith(b"[DONE]"),
        "status_of_an_unknown_artifact": refused.status_code,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--urls", nargs=2, default=["http://127.0.0.1:8001", "http://127.0.0.1:8002"])
    parser.add_argument("--router", type=Path, required=True, help="the program vllm-router")
    arguments = parser.parse_args()
    one, two = (httpx.Client(base_url=url, timeout=300, trust_env=False) for url in arguments.urls)
    model = one.get("/v1/models").json()["data"][0]["id"]
    results: dict[str, Any] = {"environment": environment(), "store": shared_store(one, two, model)}
    with router(arguments.router, arguments.urls) as address:
        results["router"] = through_the_router(address, [one, two], model)
    RESULTS.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    routed, store = results["router"], results["store"]
    passed = store["alias_seconds_most"] <= BOUND_SECONDS and routed["steered"] and routed["stream_has_the_receipt"]
    passed = passed and routed["stream_reads"] > 1 and all(routed["answers_of_each"])
    return 0 if passed and routed["status_of_an_unknown_artifact"] == 404 else 1


if __name__ == "__main__":
    sys.exit(main())
