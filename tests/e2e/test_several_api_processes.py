"""`--api-server-count 2`: two API processes on one engine serve as one does, in `polyhelm serve` and `vllm serve`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import MAX_MODEL_LEN, PROMPT, Server, free_port, serving, stop
from tests.e2e.test_stock_vllm import VLLM, named_vllm

pytestmark = pytest.mark.engine

TWO = ("--api-server-count", "2")
KEEP_ALIVE = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
"""Seconds: a connection stays with the process that accepted it."""


@contextmanager
def polyhelm_serve(data_dir: Path, models: Path) -> Iterator[Server]:
    with serving(data_dir, models, *TWO, **KEEP_ALIVE) as server:
        yield server


@contextmanager
def vllm_serve(data_dir: Path, models: Path) -> Iterator[Server]:
    port = free_port()
    command = [VLLM, "serve", str(models / "smollm2"), "--served-model-name", "smollm2", "--enforce-eager", *TWO]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(MAX_MODEL_LEN)]
    command += ["--max-num-seqs", "32", "--block-size", "32"]
    data_dir.mkdir()
    (data_dir / "metadata").mkdir()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("POLYHELM_")} | {
        "POLYHELM_ENGINE": "1",
        "POLYHELM_DATA_DIR": str(data_dir),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": named_vllm(data_dir / "metadata"),
        **KEEP_ALIVE,
    }
    log, base_url = data_dir / "server.log", f"http://127.0.0.1:{port}"
    with log.open("ab") as output, httpx.Client(base_url=base_url, timeout=120, trust_env=False) as client:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        server = Server(process, base_url, data_dir, log, client)
        try:
            server.wait_until_ready()
            yield server
            stop(server)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@dataclass
class Both:
    """The server, and a connection to each of its two API processes."""

    server: Server
    clients: dict[int, httpx.Client]
    """By process id."""
    ending: signal.Signals
    """How the last test ends the server."""


@pytest.fixture(
    scope="module",
    params=[(polyhelm_serve, signal.SIGTERM), (vllm_serve, signal.SIGKILL)],
    ids=["polyhelm serve", "vllm serve"],
)
def both(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    start: Callable[[Path, Path], AbstractContextManager[Server]]
    start, ending = request.param
    with start(tmp_path_factory.mktemp("several") / "data", models) as server:
        clients = connect_to_each(server)
        try:
            server.publish("one", seed=1)
            yield Both(server, clients, ending)
        finally:
            for client in clients.values():
                client.close()


def connect(server: Server) -> tuple[int, httpx.Client]:
    """A client with one connection, and the process that accepted it."""
    limits = httpx.Limits(max_connections=1, keepalive_expiry=None)
    client = httpx.Client(base_url=server.base_url, timeout=120, trust_env=False, limits=limits)
    return accepted_by(server, client.get("/livez")), client


def accepted_by(server: Server, response: httpx.Response) -> int:
    """The process at the other end of the connection that a response came over."""
    local = response.extensions["network_stream"].get_extra_info("client_addr")[1]
    for process in psutil.Process(server.process.pid).children(recursive=True):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_ESTABLISHED and connection.raddr.port == local:
                return process.pid
    raise AssertionError(f"no process of the server has the other end of port {local}")


def connect_to_each(server: Server, seconds: float = 120) -> dict[int, httpx.Client]:
    """One connection to each process, once both have started."""
    deadline = time.monotonic() + seconds
    clients: dict[int, httpx.Client] = {}
    while len(clients) < 2:
        assert time.monotonic() < deadline, f"one API process answers, of two\n{server.log_tail()}"
        pid, client = connect(server)
        if clients.setdefault(pid, client) is not client:
            client.close()
            time.sleep(0.2)
    return clients


def complete(client: httpx.Client, model: str, artifact: str | None, **fields: Any) -> httpx.Response:
    body: dict[str, Any] = {"model": model, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    if artifact is not None:
        body["steering"] = {"interventions": [{"artifact": artifact, "strength": 1.0}]}
    return client.post("/v1/completions", json=body | fields)


def text_and_tokens(response: httpx.Response) -> tuple[str, int | None]:
    """The text, and the tokens that the receipt counts; None without a receipt."""
    assert response.status_code == 200, response.text
    answer = response.json()
    text = answer["choices"][0]["text"]
    if "steering" not in answer:
        return text, None
    (applied,) = answer["steering"]["applied"]
    return text, applied["tokens_touched"] + applied["tokens_from_cache"]


def test_concurrent_requests_over_fresh_connections_reach_both_and_are_right(both: Both) -> None:
    server, artifacts = both.server, ("one", "two", None)
    server.publish("two", seed=2)
    expected = {each: text_and_tokens(complete(server.client, server.model, each)) for each in artifacts}
    assert len({text for text, _ in expected.values()}) == 3
    assert [expected[each][1] for each in artifacts] == [11, 11, None]

    def ask(artifact: str | None) -> tuple[int, tuple[str, int | None]]:
        with httpx.Client(base_url=server.base_url, timeout=120, trust_env=False) as client:
            response = complete(client, server.model, artifact)
            return accepted_by(server, response), text_and_tokens(response)

    asked = [artifacts[index % 3] for index in range(21)]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(ask, asked))
    assert [answer for _, answer in answers] == [expected[each] for each in asked]
    assert {pid for pid, _ in answers} == both.clients.keys()


def test_what_one_process_publishes_the_other_uses_at_once(both: Both) -> None:
    server, (first, second) = both.server, both.clients.values()
    for version, (publisher, user) in enumerate([(first, second), (second, first)], 1):
        through = Server(server.process, server.base_url, server.data_dir, server.log, publisher, server.capabilities)
        assert through.publish("shared", seed=10 + version)["version"] == version
        response = complete(user, server.model, "shared")
        assert response.status_code == 200, response.text
        assert response.json()["steering"]["applied"][0]["version"] == version


def test_both_processes_have_the_same_capabilities(both: Both) -> None:
    first, second = (client.get("/v1/capabilities").json() for client in both.clients.values())
    assert first == second
    assert first["prefix_cache"] == "tagged"


def test_a_fact_written_through_one_process_is_found_by_the_other_at_once(both: Both) -> None:
    first, second = both.clients.values()
    assert first.put("/v1/kb/collections/facts").status_code == 201
    for number, (writer, reader) in enumerate([(first, second), (second, first)] * 3):
        question = f"Who keeps the lighthouse of Port{number}?"
        fact = {"id": "keeper", "question": question, "answer": f"Keeper{number}", "language": "en"}
        assert writer.put("/v1/kb/collections/facts/facts", json=[fact]).status_code == 200
        asked = reader.post("/v1/kb/collections/facts/facts/query", json={"query": question, "top_k": 1})
        (match,) = asked.json()["data"]
        assert match["fact"]["answer"] == f"Keeper{number}" and match["score"] > 0.999
    body = {"model": both.server.model, "prompt": question, "max_tokens": 4, "knowledge": {"collection": "facts"}}
    for client in (first, second):
        receipt = client.post("/v1/completions", json=body).json()["knowledge"]
        assert [(each["id"], each["version"]) for each in receipt["facts"]] == [("keeper", 6)]
    assert second.delete("/v1/kb/collections/facts/facts/keeper").status_code == 204
    assert first.post("/v1/completions", json=body).json()["knowledge"]["decision"] == "out_of_scope"


def submit(client: httpx.Client, pairs: list[dict[str, str]], name: str) -> str:
    response = client.post("/v1/fits", json={"method": "caa", "name": name, "pairs": pairs})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def wait_for(client: httpx.Client, fit_id: str, *statuses: str, seconds: float = 120) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        job: dict[str, Any] = client.get(f"/v1/fits/{fit_id}").json()
        if job["status"] in statuses:
            return job
        time.sleep(0.05)
    raise AssertionError(f"fit {fit_id} is still {job}")


def test_a_fit_submitted_to_either_is_run_once_and_seen_by_both(both: Both, pairs: list[dict[str, str]]) -> None:
    clients = list(both.clients.values())
    ids = []
    for number, client in enumerate(clients):
        fit_id = submit(client, pairs, f"either-{number}")
        for each in clients:
            assert each.get(f"/v1/fits/{fit_id}").json()["status"] in ("queued", "running")
        ids.append(fit_id)
    for number, fit_id in enumerate(ids):
        jobs = [wait_for(each, fit_id, "succeeded", "failed") for each in clients]
        assert jobs[0] == jobs[1]
        assert (jobs[0]["status"], jobs[0]["artifact"]) == ("succeeded", f"either-{number}@1")
        assert jobs[0]["progress"] == {"done": 24, "total": 24}
        for each in clients:
            versions = each.get(f"/v1/artifacts/either-{number}").json()["versions"]
            assert [version["manifest"]["annotations"] for version in versions] == [{"fit": fit_id}]
    lists = [each.get("/v1/fits").json()["data"] for each in clients]
    assert lists[0] == lists[1]
    assert [job["id"] for job in lists[0]][-2:] == ids
    assert text_and_tokens(complete(clients[0], both.server.model, "either-1"))[1] == 11


@pytest.mark.parametrize("submitter", [0, 1])
@pytest.mark.parametrize("canceller", [0, 1])
def test_either_cancels_what_either_accepted(
    both: Both, pairs: list[dict[str, str]], submitter: int, canceller: int
) -> None:
    clients = list(both.clients.values())
    name = f"cancelled-{submitter}-{canceller}"
    running, queued = (submit(clients[submitter], pairs * 20, name) for _ in range(2))
    started = wait_for(clients[canceller], running, "running")
    assert started["progress"]["done"] < 480
    for fit_id in (queued, running):
        answer = clients[canceller].delete(f"/v1/fits/{fit_id}")
        assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")
        assert [each.get(f"/v1/fits/{fit_id}").json()["status"] for each in clients] == ["cancelled"] * 2
        assert [each.delete(f"/v1/fits/{fit_id}").status_code for each in clients] == [409] * 2
    after = submit(clients[submitter], pairs[:2], f"after-{name}")
    assert wait_for(clients[canceller], after, "succeeded", "failed", seconds=30)["status"] == "succeeded"
    assert [each.get(f"/v1/artifacts/{name}").status_code for each in clients] == [404] * 2
    both.server.wait_until_idle()


def test_it_ends_with_all_its_processes_and_keeps_its_fits(both: Both, pairs: list[dict[str, str]]) -> None:
    server, client = both.server, next(iter(both.clients.values()))
    fit_id = submit(client, pairs * 40, "interrupted")
    wait_for(client, fit_id, "running")
    processes = psutil.Process(server.process.pid).children(recursive=True)
    assert both.clients.keys() < {process.pid for process in processes}
    server.process.send_signal(both.ending)
    assert server.process.wait(30) == {signal.SIGTERM: 0, signal.SIGKILL: -signal.SIGKILL}[both.ending]
    _, left = psutil.wait_procs(processes, timeout=30)
    assert left == []
    record = json.loads((server.data_dir / "fits" / f"{fit_id}.json").read_text())
    assert record["job"]["status"] == "queued"
    assert len(record["spec"]["pairs"]) == 480
