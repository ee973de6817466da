"""The real server behind real gateways, nginx and Envoy, configured as they are shipped."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from openai import OpenAI
from safetensors.numpy import save

from tests.e2e.gateways import NAMES, Gateway, gateway

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

STREAMS, TOKENS, EVENTS = 50, 64, 5
MAX_BODY = 16 << 20
ONE = {"interventions": [{"artifact": "one", "strength": 1.0}]}
SENT = {
    "Authorization": "Bearer sk-something",
    "X-Request-Id": "request-1234",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    "tracestate": "vendor=value",
}


@pytest.fixture(scope="module", params=NAMES)
def proxied(request: pytest.FixtureRequest, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A gateway before the session's server."""
    folder = tmp_path_factory.mktemp("gateway") / request.param
    with gateway(request.param, httpx.URL(server.base_url).port or 0, folder) as running:
        yield running


async def stream_once_all_have_begun(
    client: httpx.AsyncClient, model: str, number: int, begun: asyncio.Barrier, server: Server
) -> float:
    """Sends one streamed completion; how many requests the server still ran when every stream had brought an event."""
    body = {"model": model, "prompt": f"{number} is a number", "max_tokens": TOKENS, "ignore_eos": True}
    running, whole = -1.0, b""
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True, "steering": ONE}) as response:
        assert response.status_code == 200, await response.aread()
        assert response.headers["content-type"].startswith("text/event-stream")
        async for part in response.aiter_raw():
            whole += part
            if running < 0 and b'"text":' in whole:
                await begun.wait()
                running = await asyncio.to_thread(server.metric, "vllm:num_requests_running")
    # An event may bring more than one token, where the server's sender waited for its turn.
    assert whole.count(b'"text":') > TOKENS / 2
    assert whole.rstrip().endswith(b"data: [DONE]")
    assert b'"fingerprint"' in whole
    return running


@pytest.mark.engine
def test_fifty_streams_arrive_while_they_are_generated(server: Server, proxied: Gateway) -> None:
    async def all_streams() -> list[float]:
        limits, begun = httpx.Limits(max_connections=STREAMS), asyncio.Barrier(STREAMS)
        options: dict[str, Any] = {"base_url": proxied.url, "verify": proxied.verify, "limits": limits}
        async with httpx.AsyncClient(**options, timeout=300, trust_env=False) as client:
            streams = (stream_once_all_have_begun(client, server.model, n, begun, server) for n in range(STREAMS))
            return await asyncio.gather(*streams)

    # A gateway that collects answers has none to show before the last one of them is complete.
    assert max(asyncio.run(all_streams())) > 0


@pytest.mark.engine
def test_a_client_that_leaves_stops_the_generation(server: Server, proxied: Gateway) -> None:
    body = {"model": server.model, "prompt": "Once", "max_tokens": 1900, "ignore_eos": True, "stream": True}
    server.wait_until_idle()
    before = server.metric("vllm:generation_tokens_total")
    with proxied.client() as client, client.stream("POST", "/v1/completions", json=body) as response:
        assert next(response.iter_lines()).startswith("data: ")
        assert server.metric("vllm:num_requests_running") == 1
    server.wait_until_idle()
    assert server.metric("vllm:generation_tokens_total") - before < 1900


@pytest.mark.engine
def test_a_body_of_the_maximum_size_passes_and_one_over_it_is_413(server: Server, proxied: Gateway) -> None:
    body = json.dumps({"model": server.model, "prompt": "Hello", "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"}
    with proxied.client() as client:
        largest = client.post("/v1/completions", content=body.ljust(MAX_BODY), headers=headers)
        assert largest.status_code == 200, largest.text
        # The gateway may close the connection before all of it is sent.
        larger = client.post("/v1/completions", content=body.ljust(MAX_BODY + 1), headers=headers)
    assert_envelope(larger, 413)


@pytest.mark.engine
def test_an_artifact_larger_than_other_bodies_passes(server: Server, proxied: Gateway) -> None:
    width = server.capabilities["hidden_size"]
    features = 4096
    tensors = {
        "encoder": np.ones((features, width), np.float32),
        "decoder": np.ones((features, width), np.float32),
        "encoder_bias": np.zeros(features, np.float32),
    }
    content = save(tensors)
    assert len(content) > MAX_BODY
    site = {"point": "resid_post", "layer": 3, "file": "sae.safetensors", "dtype": "F32"}
    sites = [site | {"role": name, "tensor": name, "shape": list(value.shape)} for name, value in tensors.items()]
    manifest = server.manifest(kind="sae", activation="relu", sites=sites, default_layers=[3], h_norm={})
    with proxied.client() as client:
        published = client.post(
            f"/v1/artifacts/large-{proxied.name}/versions",
            data={"manifest": json.dumps(manifest)},
            files=[("files", ("sae.safetensors", content))],
        )
    assert published.status_code == 201, published.text


@pytest.mark.engine
def test_the_request_id_reaches_the_server(server: Server, proxied: Gateway) -> None:
    body = {"model": server.model, "prompt": "Hello", "max_tokens": 1}
    with proxied.client() as client:
        named = client.post("/v1/completions", json=body, headers={"X-Request-Id": f"mine-{proxied.name}"})
        unnamed = client.post("/v1/completions", json=body)
    assert f"mine-{proxied.name}" in named.json()["id"]
    assert unnamed.status_code == 200


@pytest.mark.engine
def test_the_openai_client_steers_through_it(server: Server, proxied: Gateway) -> None:
    with (
        httpx.Client(verify=proxied.verify, trust_env=False) as http,
        OpenAI(base_url=f"{proxied.url}/v1", api_key="none", max_retries=0, http_client=http) as client,
    ):
        messages: Any = [{"role": "user", "content": "How was the film?"}]
        options: Any = {"model": server.model, "messages": messages, "max_tokens": 8, "temperature": 0}
        steered = client.chat.completions.create(**options, extra_body={"steering": ONE})
        chunks = list(client.chat.completions.create(**options, extra_body={"steering": ONE}, stream=True))
    assert steered.steering["applied"][0]["tokens_touched"] > 0  # type: ignore[attr-defined]
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert streamed == steered.choices[0].message.content


@pytest.mark.engine
def test_metrics_are_not_for_clients(server: Server, proxied: Gateway) -> None:
    with proxied.client() as client:
        assert_envelope(client.get("/metrics"), 404)
    assert server.client.get("/metrics").status_code == 200


class Upstream(BaseHTTPRequestHandler):
    """GET answers with the headers that reached it. POST streams events, each once the one before has arrived."""

    protocol_version = "HTTP/1.1"
    arrived = threading.Semaphore(0)

    def do_GET(self) -> None:
        content = json.dumps({name.lower(): value for name, value in self.headers.items()}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(EVENTS):
            self.wfile.write(b"9\r\ndata: x\n\n\r\n")
            self.wfile.flush()
            if not self.arrived.acquire(timeout=30):
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def upstream() -> Iterator[int]:
    """The port of an `Upstream`."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("name", NAMES)
def test_keys_request_ids_and_traces_pass_unchanged(name: str, upstream: int, tmp_path: Path) -> None:
    with gateway(name, upstream, tmp_path / name) as running, running.client() as client:
        arrived = client.get("/v1/models", headers=SENT).json()
        made = client.get("/v1/models", headers={"X-Forwarded-For": "1.2.3.4"}).json()
    assert {key: arrived.get(key.lower()) for key in SENT} == SENT
    assert arrived["x-forwarded-proto"] == "https"
    assert len(made["x-request-id"]) >= 32
    # The address that the gateway saw comes last, whatever the client claims.
    assert made["x-forwarded-for"].split(",")[-1].strip() not in ("", "1.2.3.4")


@pytest.mark.parametrize("name", NAMES)
def test_an_event_is_passed_on_before_the_next_one_is_made(name: str, upstream: int, tmp_path: Path) -> None:
    events = 0
    with gateway(name, upstream, tmp_path / name) as running, running.client() as client:
        with client.stream("POST", "/v1/completions", json={}) as response:
            for line in response.iter_lines():
                if line:
                    events += 1
                    Upstream.arrived.release()
    assert events == EVENTS


@pytest.mark.parametrize("name", NAMES)
def test_without_a_server_the_error_has_the_envelope(name: str, tmp_path: Path) -> None:
    unused = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    port = unused.server_address[1]
    unused.server_close()
    with gateway(name, port, tmp_path / name) as running, running.client() as client:
        refused = client.post("/v1/completions", json={}, headers={"Authorization": "Bearer sk-secret"})
    assert_envelope(refused, 502 if name == "nginx" else 503)
    assert "sk-secret" not in running.log.read_text("utf-8")


def assert_envelope(response: httpx.Response, status: int) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"].startswith("application/json")
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (status, None)
