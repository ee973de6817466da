"""How a server with static keys, small limits and traces serves, and ends; and how one ends whose engine dies."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import PROMPT, Server

pytestmark = pytest.mark.engine

ADMIN, USER = "the-admins-static-key", "a-users-static-key"
CANARY = "marmalade-canary"
ONE = {"interventions": [{"artifact": "one", "strength": 0.5}]}
MAX_REQUESTS = 12


class Collector:
    """Takes OpenTelemetry spans over HTTP."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1/traces"

    def spans(self, trace_id: str) -> dict[str, Any]:
        """By name, those of a trace that have come until now."""
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        requests = [ExportTraceServiceRequest.FromString(body) for body in list(self.bodies)]
        resources = [each for request in requests for each in request.resource_spans]
        spans = [span for each in resources for scope in each.scope_spans for span in scope.spans]
        return {span.name: span for span in spans if span.trace_id.hex() == trace_id}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


@pytest.fixture(scope="module")
def guarded(
    start_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, collector: Collector
) -> Iterator[Server]:
    """A server that the last test using it ends."""
    settings = {
        "POLYHELM_ADMIN_API_KEY": ADMIN,
        "POLYHELM_OPEN_METRICS": "false",
        "POLYHELM_MAX_REQUESTS": str(MAX_REQUESTS),
        "POLYHELM_MAX_BYTES_IN_FLIGHT": str(4 << 20),
        "POLYHELM_HEADER_SECONDS": "2",
        "POLYHELM_CLIENT_SECONDS": "3",
        "POLYHELM_KEEP_ALIVE_SECONDS": "0.1",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    arguments = ("--api-key", USER, "--otlp-traces-endpoint", collector.url)
    with start_server(tmp_path_factory.mktemp("guarded") / "data", *arguments, **settings) as server:
        server.client.headers["Authorization"] = f"Bearer {ADMIN}"
        server.capabilities = server.client.get("/v1/capabilities").json()
        server.publish("one", seed=1)
        yield server


def as_user(server: Server) -> httpx.Client:
    headers = {"Authorization": f"Bearer {USER}"}
    return httpx.Client(base_url=server.base_url, timeout=60, trust_env=False, headers=headers)


def body(server: Server, **fields: Any) -> dict[str, Any]:
    return {"model": server.model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "ignore_eos": True} | fields


def test_static_keys_share_one_mechanism_and_are_never_told(guarded: Server) -> None:
    with as_user(guarded) as user:
        assert user.post("/v1/completions", json=body(guarded, steering=ONE)).status_code == 200
        assert user.put("/v1/artifacts/one/aliases/live", json={"version": 1}).status_code == 403
        assert user.get("/metrics").status_code == 200
    assert guarded.client.put("/v1/artifacts/one/aliases/live", json={"version": 1}).status_code == 200
    with httpx.Client(base_url=guarded.base_url, trust_env=False) as nobody:
        assert [nobody.get(path).status_code for path in ("/v1/models", "/metrics", "/tokenize")] == [401] * 3
        assert [nobody.get(path).status_code for path in ("/livez", "/readyz", "/health", "/ping")] == [200] * 4
    log = guarded.log.read_text("utf-8", "replace")
    assert ADMIN not in log and USER not in log


def test_deep_readiness_generates(guarded: Server) -> None:
    answer = guarded.client.get("/readyz?deep=1")
    assert (answer.status_code, answer.json()["checks"]["generation"]) == (200, "ok")


def test_spans_lead_from_the_callers_trace_into_the_engine_and_hold_no_text(
    guarded: Server, collector: Collector
) -> None:
    trace, parent = "c3" * 16, "d4" * 8
    sent = {"traceparent": f"00-{trace}-{parent}-01"}
    answer = guarded.client.post("/v1/completions", json=body(guarded, prompt=CANARY, steering=ONE), headers=sent)
    assert answer.status_code == 200
    names = {"POST /v1/completions", "steering.resolve", "engine.generate", "llm_request"}
    deadline = time.monotonic() + 30
    while not names <= collector.spans(trace).keys():
        assert time.monotonic() < deadline, collector.spans(trace).keys()
        time.sleep(0.1)
    spans = collector.spans(trace)
    top = spans["POST /v1/completions"]
    assert top.parent_span_id.hex() == parent
    assert {spans[name].parent_span_id for name in names - {top.name}} == {top.span_id}
    used = {each.key: each.value.int_value for each in spans["engine.generate"].attributes}
    assert used["gen_ai.usage.output_tokens"] == 4
    assert used["gen_ai.usage.input_tokens"] == answer.json()["usage"]["prompt_tokens"]
    resolved = {each.key: each.value.string_value for each in spans["steering.resolve"].attributes}
    assert resolved["polyhelm.steering.fingerprint"] == answer.json()["steering"]["fingerprint"]
    assert not [each for each in collector.bodies if CANARY.encode() in each or ADMIN.encode() in each]


def test_spans_of_a_question_say_how_long_its_facts_took_and_hold_none(guarded: Server, collector: Collector) -> None:
    trace, question = "e5" * 16, f"Who is {CANARY}?"
    facts = [{"id": "it", "question": question, "answer": f"{CANARY} Zett", "language": "en"}]
    headers = {"traceparent": f"00-{trace}-{'f6' * 8}-01"}
    assert guarded.client.put("/v1/kb/collections/traced").status_code in (200, 201)
    assert guarded.client.put("/v1/kb/collections/traced/facts", json=facts).status_code == 200
    asked = body(guarded, prompt=question, knowledge={"collection": "traced"}, steering=ONE)
    answer = guarded.client.post("/v1/completions", json=asked, headers=headers)
    assert answer.json()["knowledge"]["facts"][0]["id"] == "it"
    names = {"POST /v1/completions", "kb.encode", "kb.search", "steering.resolve", "engine.generate"}
    deadline = time.monotonic() + 30
    while not names <= collector.spans(trace).keys():
        assert time.monotonic() < deadline, collector.spans(trace).keys()
        time.sleep(0.1)
    spans = collector.spans(trace)
    top = spans["POST /v1/completions"]
    assert {spans[name].parent_span_id for name in names - {top.name}} == {top.span_id}
    assert spans["kb.encode"].end_time_unix_nano <= spans["kb.search"].start_time_unix_nano
    assert not [each for each in collector.bodies if CANARY.encode() in each]


def raw(server: Server, *parts: bytes, pause: float = 0.0) -> bytes:
    """Send bytes, and return what comes until the server closes the connection."""
    host, port = server.base_url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=15) as peer, ThreadPoolExecutor(1) as reader:
        # Meanwhile: what a server sends before it closes is lost to whoever goes on sending.
        answer = reader.submit(read, peer)
        with suppress(ConnectionResetError, BrokenPipeError):
            for part in parts:
                peer.sendall(part)
                time.sleep(pause)
        return answer.result()


def read(peer: socket.socket) -> bytes:
    answer = b""
    with suppress(ConnectionResetError):
        while part := peer.recv(65536):
            answer += part
    return answer


def head(path: str = "/v1/completions", **headers: str) -> bytes:
    fields = {"Host": "x", "Authorization": f"Bearer {USER}", "Content-Type": "application/json", **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"POST {path} HTTP/1.1\r\n{lines}".encode()


def test_slow_and_oversized_requests_are_given_up_and_others_served(guarded: Server) -> None:
    with ThreadPoolExecutor(24) as pool:
        loris = [pool.submit(raw, guarded, head(), *[b"X: y\r\n"] * 40, pause=0.2) for _ in range(10)]
        drip = [
            pool.submit(raw, guarded, head(Content_Length="5000") + b"\r\n", *[b" "] * 40, pause=0.2) for _ in range(4)
        ]
        time.sleep(0.5)
        started = time.monotonic()
        assert guarded.client.post("/v1/completions", json=body(guarded)).status_code == 200
        assert time.monotonic() - started < 20
        assert [each.result()[:12] for each in loris] == [b"HTTP/1.1 408"] * 10
        assert [each.result()[:12] for each in drip] == [b"HTTP/1.1 408"] * 4
    assert raw(guarded, head(X="a" * 100_000) + b"\r\n").startswith(b"HTTP/1.1 431")


def test_load_beyond_the_bound_is_refused_and_what_runs_is_not_hurt(guarded: Server) -> None:
    with ThreadPoolExecutor(2 * MAX_REQUESTS) as pool, as_user(guarded) as user:
        sent = body(guarded, max_tokens=60)
        answers = list(pool.map(lambda _: user.post("/v1/completions", json=sent), range(2 * MAX_REQUESTS)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503} and statuses.count(200) >= MAX_REQUESTS
    refused = next(answer for answer in answers if answer.status_code == 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "ServiceUnavailableError"
    guarded.wait_until_idle()
    assert guarded.client.post("/v1/completions", json=sent).status_code == 200


def streamed(server: Server, begun: threading.Event, **fields: Any) -> tuple[dict[str, str], list[str]]:
    """The headers of a stream and its lines."""
    sent = body(server, stream=True, **fields)
    headers = dict(server.client.headers)
    with httpx.stream("POST", f"{server.base_url}/v1/completions", json=sent, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200
        lines = []
        for line in answer.iter_lines():
            begun.set()
            lines.append(line)
        return dict(answer.headers), [line for line in lines if line]


def test_streams_have_the_headers_that_proxies_need(guarded: Server) -> None:
    for steering in ({}, {"steering": ONE}):
        headers, lines = streamed(guarded, threading.Event(), **steering)
        assert headers["content-type"].startswith("text/event-stream")
        assert (headers["x-accel-buffering"], headers["cache-control"]) == ("no", "no-cache")
        assert lines[-1] == "data: [DONE]"


def test_sigterm_lets_running_streams_end_and_takes_nothing_new(guarded: Server) -> None:
    begun = [threading.Event() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        running = [
            pool.submit(streamed, guarded, event, max_tokens=100, **({"steering": ONE} if index % 2 else {}))
            for index, event in enumerate(begun)
        ]
        assert all(event.wait(30) for event in begun)
        guarded.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while guarded.client.get("/readyz").status_code != 503:
            assert time.monotonic() < deadline, "it is ready still"
            time.sleep(0.02)
        assert guarded.client.get("/readyz").json()["checks"]["traffic"] == "the server is going down"
        assert guarded.client.get("/livez").status_code == 200
        assert guarded.client.get("/health").status_code == 503
        refused = guarded.client.post("/v1/completions", json=body(guarded))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        for index, each in enumerate(running):
            _, lines = each.result()
            assert lines[-1] == "data: [DONE]"
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line.startswith("data: ")]
            assert not [chunk for chunk in chunks if "error" in chunk]
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
            assert ("steering" in chunks[-1]) == bool(index % 2)
    assert guarded.process.wait(30) == 0
    assert "Traceback" not in guarded.log_tail(200)


def running(server: Server) -> float:
    """How many requests the engine runs."""
    lines = server.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_running{"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_engine_core(process: psutil.Process) -> bool:
    """It names itself; some that the engine starts for a moment may be gone already."""
    with suppress(psutil.NoSuchProcess):
        return "EngineCore" in process.name() or "EngineCore" in " ".join(process.cmdline())
    return False


def test_dead_engine_ends_the_server_within_seconds_and_with_an_error(
    start_server: Callable[..., Any], tmp_path: Path
) -> None:
    with start_server(tmp_path / "data") as server:
        server.publish("one", seed=1)
        begun = threading.Event()
        with ThreadPoolExecutor(2) as pool:
            steered = pool.submit(streamed, server, begun, max_tokens=1500, steering=ONE)
            whole = pool.submit(server.client.post, "/v1/completions", json=body(server, max_tokens=1500))
            assert begun.wait(60)
            wait_until(lambda: running(server) == 2)
            processes = psutil.Process(server.process.pid).children(recursive=True)
            (core,) = (each for each in processes if is_engine_core(each))
            killed = time.monotonic()
            core.kill()
            _, lines = steered.result()
            assert time.monotonic() - killed < 30
            assert '"error"' in "".join(lines[-3:]) and lines[-1] == "data: [DONE]"
            assert "steering" not in json.loads(lines[-2].removeprefix("data: "))
            assert whole.result().status_code == 500
        assert server.process.wait(60) == 1
        _, left = psutil.wait_procs(processes, timeout=60)
        assert left == []
        assert "the engine has died" in server.log_tail(200)
