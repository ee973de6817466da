"""Keys and tenants on the running server, made by `polyhelm key` while it runs."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from safetensors.numpy import save

from server.keys import FILE
from tests.e2e.conftest import FILE as VECTORS
from tests.e2e.conftest import POLYHELM, PROMPT, Server

pytestmark = pytest.mark.engine

MakeKey = Callable[..., httpx.Client]


def polyhelm_key(server: Server, *arguments: str) -> Any:
    done = subprocess.run(
        [POLYHELM, "key", *arguments, "--json", "--data-dir", str(server.data_dir)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def make_key(server: Server) -> Iterator[MakeKey]:
    """`make_key("--scope", ...)` is a client that sends a new key. At the end the server is open again, for others."""
    clients: list[httpx.Client] = []

    def make(*arguments: str) -> httpx.Client:
        made = polyhelm_key(server, "create", "test", *arguments)
        headers = {"Authorization": f"Bearer {made['key']}"}
        clients.append(httpx.Client(base_url=server.base_url, timeout=120, trust_env=False, headers=headers))
        return clients[-1]

    yield make
    for client in clients:
        client.close()
    with sqlite3.connect(server.data_dir / FILE) as db:
        db.execute("DELETE FROM keys")
    assert server.client.get("/v1/models").status_code == 200


def complete(server: Server, client: httpx.Client, **fields: Any) -> httpx.Response:
    body = {"model": server.model, "prompt": PROMPT, "max_tokens": 4, "temperature": 0} | fields
    return client.post("/v1/completions", json=body)


def test_running_server_closes_with_its_first_key_and_follows_revocations(server: Server, make_key: MakeKey) -> None:
    assert server.ask(max_tokens=1).status_code == 200
    client = make_key()
    for path in ("/v1/completions", "/tokenize", "/invocations", "/v1/responses", "/generative_scoring"):
        assert server.client.post(path, json={}).status_code == 401, path
    assert complete(server, client).status_code == 200
    assert complete(server, client, steering={"interventions": [{"artifact": "one"}]}).status_code == 200
    assert server.client.get("/readyz").status_code == server.client.get("/metrics").status_code == 200
    key_id = next(each["id"] for each in polyhelm_key(server, "list") if each["state"] == "good")
    assert polyhelm_key(server, "revoke", key_id)["state"] == "was revoked"
    assert complete(server, client).status_code == 401


def test_scopes_hold_on_the_real_routes(server: Server, make_key: MakeKey) -> None:
    clients = {scope: make_key("--scope", scope) for scope in ("generate", "read", "capture", "admin")}
    captured = {"prompts": ["Hi"], "sites": ["resid_post.3"]}
    fit = {"method": "caa", "name": "x", "pairs": []}
    calls = {
        "generate": lambda client: complete(server, client),
        "read": lambda client: client.get("/v1/artifacts/one"),
        "capture": lambda client: client.post("/v1/activations", json=captured),
        "admin": lambda client: client.post("/v1/fits", json=fit),
    }
    for needed, call in calls.items():
        for scope, client in clients.items():
            status = call(client).status_code
            assert (status == 403) == (scope != needed), (needed, scope, status)
    assert clients["generate"].get("/kv_event_sources").status_code == 403


def test_tenants_see_their_own_and_what_is_everybodys(server: Server, make_key: MakeKey) -> None:
    acme, beta = (
        make_key("--tenant", tenant, *(f"--scope={scope}" for scope in ("generate", "read", "admin")))
        for tenant in ("acme", "beta")
    )

    def publish(client: httpx.Client, name: str) -> int:
        as_client = Server(server.process, server.base_url, server.data_dir, server.log, client, server.capabilities)
        return as_client.send_artifact(name, server.manifest(), {VECTORS: save(server.vectors(31))}).status_code

    assert publish(acme, "acme--mine") in (200, 201)
    assert publish(acme, "everybodys") == 403
    steering = {"steering": {"interventions": [{"artifact": "acme--mine"}]}}
    assert complete(server, acme, **steering).json()["steering"]["applied"][0]["artifact"] == "acme--mine"
    refused = complete(server, beta, **steering)
    assert (refused.status_code, refused.json()["error"]["param"]) == (404, "steering.interventions.0.artifact")
    shared = {"steering": {"interventions": [{"artifact": "one"}]}}
    assert [complete(server, client, **shared).status_code for client in (acme, beta)] == [200, 200]
    names = [each["id"] for each in beta.get("/v1/artifacts?limit=1000").json()["data"]]
    assert "one" in names and "acme--mine" not in names
    fit = {"method": "caa", "name": "beta--x", "pairs": [{"positive": "a", "negative": "b"}] * 2}
    assert acme.post("/v1/fits", json=fit).status_code == 403
    accepted = beta.post("/v1/fits", json=fit)
    assert accepted.status_code == 202
    assert acme.get(accepted.headers["location"]).status_code == 404
    assert acme.delete(accepted.headers["location"]).status_code == 404
    assert accepted.json()["id"] not in acme.get("/v1/fits").text
    assert beta.get(accepted.headers["location"]).status_code == 200


def test_no_tenant_finds_anothers_prompt_in_the_prefix_cache(server: Server, make_key: MakeKey) -> None:
    acme, second, beta, nobody = (
        make_key("--tenant", "acme"),
        make_key("--tenant", "acme"),
        make_key("--tenant", "beta"),
        make_key(),
    )
    prompt = "A secret plan that nobody else has written down yet, in many words. " * 12

    def hits(client: httpx.Client, **fields: Any) -> float:
        before = server.metric("vllm:prefix_cache_hits_total")
        # vLLM itself takes no control characters in a salt.
        status = 400 if "\0" in fields.get("cache_salt", "") else 200
        assert complete(server, client, prompt=prompt, max_tokens=1, **fields).status_code == status
        return server.metric("vllm:prefix_cache_hits_total") - before

    assert hits(acme) == 0
    assert hits(acme) > 100 and hits(second) > 100, "keys of one tenant share"
    for other in (beta, nobody):
        for guess in ({}, {"cache_salt": "acme"}, {"cache_salt": "acme\0"}):
            assert hits(other, **guess) == 0


def test_limits_of_a_key_hold_for_streams_too(server: Server, make_key: MakeKey) -> None:
    client = make_key("--tokens-per-minute", "30")
    with client.stream("POST", "/v1/completions", json=streamed(server, max_tokens=60, ignore_eos=True)) as answer:
        assert answer.headers["x-ratelimit-limit-tokens"] == "30"
        answer.read()
    refused = complete(server, client)
    assert (refused.status_code, refused.json()["error"]["type"]) == (429, "RateLimitError")
    # 5 tokens of the prompt and 60 of the answer, of 30.
    assert 60 <= int(refused.headers["retry-after"]) <= 72


def streamed(server: Server, **fields: Any) -> dict[str, Any]:
    return {"model": server.model, "prompt": PROMPT, "temperature": 0, "stream": True} | fields


def test_log_has_a_line_for_each_request_and_no_word_of_it(server: Server, make_key: MakeKey) -> None:
    client = make_key("--tenant", "acme")
    token = client.headers["authorization"].partition(" ")[2]
    canary = "xylophone-canary"
    steered = {"steering": {"interventions": [{"artifact": "one"}]}}
    sent = {"X-Request-Id": "log-test", "traceparent": f"00-{'a1' * 16}-{'b2' * 8}-01"}
    answer = client.post(
        "/v1/completions", json=streamed(server, prompt=canary, max_tokens=3, stream=False) | steered, headers=sent
    )
    assert (answer.status_code, answer.headers["x-request-id"]) == (200, "log-test")
    for body in (
        {"prompt": canary, "max_tokens": -1},
        {"prompt": [canary, 1.5]},
        {"messages": canary},
        {"prompt": canary, "temperature": canary},
        {"prompt": canary, "steering": {"interventions": [{"artifact": canary}]}},
        {"prompt": canary, "logit_bias": {canary: 1}},
        {"prompt": canary, "stop": [canary], "echo": True, "logprobs": 3, "max_tokens": 1},
        {"prompt": canary * 4000},
    ):
        complete(server, client, **body)
        client.post("/v1/chat/completions", json={"model": canary} | body)
    cut_off = b'{"prompt": "' + canary.encode()
    client.post("/v1/completions", content=cut_off, headers={"content-type": "application/json"})
    client.get(f"/v1/artifacts/{canary}?prefix={canary}")
    server.client.get("/v1/models", headers={"Authorization": f"Bearer {token}{canary}"})
    log = server.log.read_text("utf-8", "replace")
    assert canary not in log
    assert token[17:] not in log
    (line,) = (json.loads(each) for each in log.splitlines() if '"log-test"' in each)
    assert line["event"] == "request" and line["level"] == "info"
    assert (line["route"], line["status"], line["tenant"]) == ("/v1/completions", 200, "acme")
    assert (line["completion_tokens"], line["trace_id"]) == (3, "a1" * 16)
    assert line["steering_fingerprint"] == answer.json()["steering"]["fingerprint"]
    assert line["prompt_tokens"] == answer.json()["usage"]["prompt_tokens"]


def test_log_has_no_word_of_facts_fits_or_captured_prompts(server: Server, make_key: MakeKey) -> None:
    scopes = (f"--scope={scope}" for scope in ("generate", "read", "capture", "admin"))
    client, canary = make_key("--tenant", "acme", *scopes), "vibraphone-canary"
    collection = "/v1/kb/collections/acme--log"
    fact = {"id": canary, "question": f"Who is {canary}?", "answer": canary, "metadata": {canary: canary}}
    assert client.put(collection).status_code == 201
    facts = f"{collection}/facts"
    lines = {"content-type": "application/x-ndjson"}
    pairs = [{"positive": f"{canary} {n}", "negative": f"not {canary} {n}"} for n in range(2)]
    fit = {"method": "caa", "name": "acme--log", "pairs": pairs}
    accepted = client.post("/v1/fits", json=fit)
    knowledge = {"collection": "acme--log"}
    captured = {"prompts": [canary], "sites": ["resid_post.3"]}
    answers = {
        "written": client.put(facts, json=[fact]),
        "read": client.get(f"{facts}/{canary}?subject={canary}"),
        "asked": client.post(f"{facts}/query", json={"query": canary, "filter": {"metadata": {canary: canary}}}),
        "answered": complete(server, client, prompt=fact["question"], knowledge=knowledge),
        "captured": client.post("/v1/activations", json=captured),
    }
    assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(answers, 200)
    refused = [
        client.put(facts, json=[fact | {"valid_from": canary}]),
        client.put(facts, json=[fact | {canary: canary}]),
        client.put(facts, json=[fact | {"embedding": [canary]}]),
        client.put(facts, content=json.dumps(fact | {"language": canary}) + f'\n{{"{canary}', headers=lines),
        client.post(f"{facts}/query", json={"query": canary, "at": canary}),
        client.post(f"{facts}/query", json={"query": canary, "filter": {canary: canary}}),
        client.post(f"{facts}/delete", json={"ids": [canary], canary: 1}),
        complete(server, client, prompt=canary, knowledge=knowledge | {"edit_language": canary}),
        complete(server, client, prompt=[canary, canary], knowledge=knowledge),
        client.post("/v1/fits", json=fit | {"pairs": [{"positive": canary}]}),
        client.post("/v1/fits", json=fit | {"method": canary}),
        client.post("/v1/activations", json=captured | {"sites": [canary]}),
        client.post("/v1/activations", json={"prompts": [canary * 4000], "sites": ["resid_post.3"]}),
    ]
    assert all(400 <= answer.status_code < 500 for answer in refused), refused
    assert client.delete(f"{facts}/{canary}").status_code == 204
    while client.get(accepted.headers["location"]).json()["status"] in ("queued", "running"):
        time.sleep(0.1)
    assert client.get(accepted.headers["location"]).json()["status"] == "succeeded"
    assert canary not in server.log.read_text("utf-8", "replace")


def test_metrics_tell_what_steering_did(server: Server, make_key: MakeKey) -> None:
    client = make_key()

    def metric(name: str) -> float:
        return server.metric(name)

    names = ("polyhelm_interventions_total", "polyhelm_tokens_touched_total", "polyhelm_rejected_total")
    before = {name: metric(name) for name in names}
    steering = {"interventions": [{"artifact": "one", "apply": {"generation": "all"}}]}
    assert complete(server, client, steering=steering, ignore_eos=True).status_code == 200
    assert complete(server, client, steering={"interventions": []}).status_code == 422
    after = {name: metric(name) for name in names}
    # The last of the four tokens never runs through the model.
    assert [after[name] - before[name] for name in names] == [1, 3, 1]
    assert metric("polyhelm_bank_resident_bytes") > 0
    assert metric("polyhelm_bank_budget_bytes") == 256 << 20
