"""One real server for all these tests: `polyhelm serve` in a process of its own, spoken to over HTTP."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

POLYHELM = str(Path(sys.executable).with_name("polyhelm"))
FILE = "vectors.safetensors"
START_SECONDS = 500
STOP_SECONDS = 30
MAX_MODEL_LEN = 2048
NORM = 60.0
"""L2 norm of the made-up vectors, of the order of this model's activations."""
H_NORM = 80.0
LAYERS = (10, 11, 12)
PROMPT = "The weather today is"


@dataclass
class Server:
    """A running `polyhelm serve`."""

    process: subprocess.Popen[bytes]
    base_url: str
    data_dir: Path
    log: Path
    client: httpx.Client
    capabilities: dict[str, Any] = field(default_factory=dict)

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}\n{self.log_tail()}"
            try:
                if self.client.get("/readyz").status_code == 200:
                    self.capabilities = self.client.get("/v1/capabilities").json()
                    return
            except httpx.TransportError:
                time.sleep(0.2)
        raise AssertionError(f"the server isn't ready after {START_SECONDS} s\n{self.log_tail()}")

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-lines:])

    @property
    def model(self) -> str:
        return str(self.capabilities["model"]["id"])

    def manifest(self, **changes: Any) -> dict[str, Any]:
        """The manifest of vectors for the served model; `changes` replace fields."""
        identity, hidden = self.capabilities["model"], self.capabilities["hidden_size"]
        keys = ("architecture", "hidden_size", "num_layers", "weights_digest", "tokenizer_digest")
        place = {"point": "resid_post", "file": FILE, "shape": [hidden], "dtype": "F32"}
        manifest = {
            "schema_version": 1,
            "kind": "steering_vector",
            "model": {key: identity[key] for key in keys},
            "sites": [{**place, "layer": layer, "tensor": f"layer.{layer}"} for layer in LAYERS],
            "default_strength": 2.0,
            "default_layers": [10, 11],
            "h_norm": {str(layer): H_NORM + layer for layer in LAYERS},
            "provenance": {"method": "caa"},
        }
        return manifest | changes

    def vectors(self, seed: int) -> dict[str, np.ndarray]:
        """Random directions, one per layer; their norms differ, so that a dose tells the layers apart."""
        directions = np.random.default_rng(seed).standard_normal((len(LAYERS), self.capabilities["hidden_size"]))
        scaled = NORM * directions / np.linalg.norm(directions, axis=1, keepdims=True)
        return {
            f"layer.{layer}": ((1 + 0.1 * index) * scaled[index]).astype(np.float32)
            for index, layer in enumerate(LAYERS)
        }

    def send_artifact(self, name: str, manifest: Mapping[str, Any] | str, files: Mapping[str, bytes]) -> httpx.Response:
        parts = [("files", (path, content)) for path, content in files.items()]
        text = manifest if isinstance(manifest, str) else json.dumps(manifest)
        return self.client.post(f"/v1/artifacts/{name}/versions", data={"manifest": text}, files=parts)

    def publish(self, name: str, seed: int = 0, **changes: Any) -> dict[str, Any]:
        """Publish random vectors under a name and return the version."""
        response = self.send_artifact(name, self.manifest(**changes), {FILE: save(self.vectors(seed))})
        assert response.status_code in (200, 201), response.text
        version: dict[str, Any] = response.json()
        return version

    def ask(self, *interventions: Mapping[str, Any], **fields: Any) -> httpx.Response:
        """A greedy completion; steered when there are interventions."""
        body: dict[str, Any] = {"model": self.model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0} | fields
        if interventions:
            body["steering"] = {"interventions": list(interventions)}
        return self.client.post("/v1/completions", json=body)

    def complete(self, *interventions: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        """The answer to `ask`, which must succeed, and must have a receipt exactly when it is steered."""
        response = self.ask(*interventions, **fields)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        assert ("steering" in answer) == bool(interventions)
        return answer

    def text(self, *interventions: Mapping[str, Any], **fields: Any) -> str:
        return str(self.complete(*interventions, **fields)["choices"][0]["text"])

    def metric(self, name: str) -> float:
        """The sum of a metric of /metrics over its labels."""
        lines = self.client.get("/metrics").text.splitlines()
        values = [float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        assert values, f"/metrics has no {name}"
        return sum(values)

    def wait_until_idle(self, seconds: float = 30) -> None:
        deadline = time.monotonic() + seconds
        while self.metric("vllm:num_requests_running") or self.metric("vllm:num_requests_waiting"):
            assert time.monotonic() < deadline, "the engine still runs requests"
            time.sleep(0.2)

    def wait_for_fit(self, fit_id: str, *statuses: str, seconds: float = 400) -> dict[str, Any]:
        """Poll a job until its status is one of those."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            job: dict[str, Any] = self.client.get(f"/v1/fits/{fit_id}").json()
            if job["status"] in statuses:
                return job
            time.sleep(0.05)
        raise AssertionError(f"fit {fit_id} is still {job}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(data_dir: Path, models: Path, *arguments: str, **settings: str) -> Iterator[Server]:
    """Start a server and wait for it. At the end SIGTERM must end it, unless the test ended it before.

    `settings` are variables of its environment.
    """
    data_dir.mkdir(exist_ok=True)
    if not (data_dir / "models").exists():
        (data_dir / "models").symlink_to(models)
    port = free_port()
    command = [
        POLYHELM,
        "serve",
        "--data-dir",
        str(data_dir),
        "--port",
        str(port),
        "--max-model-len",
        str(MAX_MODEL_LEN),
    ]
    command += ["--max-num-seqs", "32", "--block-size", "32", *arguments]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POLYHELM_")}
    # Unbound threads: vLLM binds every engine of a machine to the same cores, and other tests may run one as well.
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **settings,
    }
    log = data_dir / "server.log"
    base_url = f"http://127.0.0.1:{port}"
    with log.open("ab") as output, httpx.Client(base_url=base_url, timeout=120, trust_env=False) as client:
        # A session of its own, so that nothing of it is left behind whatever a test does to it.
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        server = Server(process, base_url, data_dir, log, client)
        try:
            server.wait_until_ready()
            yield server
            stop(server)
        finally:
            _kill_session(process)


def stop(server: Server) -> None:
    if server.process.poll() is not None:
        return
    server.process.send_signal(signal.SIGTERM)
    try:
        server.process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"SIGTERM doesn't end the server in {STOP_SECONDS} s\n{server.log_tail()}") from None


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@pytest.fixture(scope="session")
def start_server(models: Path) -> Callable[..., Any]:
    """`start_server(data_dir, *arguments, **settings)` is a context manager that yields a Server."""
    return lambda data_dir, *arguments, **settings: serving(data_dir, models, *arguments, **settings)


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of this session, with the random artifacts `one` and `two` in it."""
    data_dir = tmp_path_factory.mktemp("served") / "data"
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with start_server(data_dir, *tools, POLYHELM_EXPERT_MODELS="smollm2") as server:
        server.publish("one", seed=1)
        server.publish("two", seed=2)
        yield server


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, str]]:
    """The twelve shortest pairs of the demo data."""
    lines = resources.files("server").joinpath("demo_data", "sentiment.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in sorted(lines, key=len)[:12]]


@pytest.fixture(scope="session")
def fitted(server: Server, pairs: list[dict[str, str]]) -> dict[str, Any]:
    """A real vector, fitted over HTTP: the finished job."""
    accepted = server.client.post("/v1/fits", json={"method": "caa", "name": "fitted", "pairs": pairs})
    assert accepted.status_code == 202, accepted.text
    return server.wait_for_fit(accepted.json()["id"], "succeeded", "failed")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    server = getattr(item, "funcargs", {}).get("server")
    if report.failed and isinstance(server, Server):
        report.sections.append(("end of the server's log", server.log_tail()))
    return report
