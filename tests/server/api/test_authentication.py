from __future__ import annotations

import asyncio
import errno
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.types import Message

from server.keys import FILE, KeyStore, Limits
from tests.server.api.artifact_app import assert_refused
from tests.server.api.guarded_app import Lines, guarded

COMPLETE = "/v1/completions"


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path)


@pytest.fixture
def client(keys: KeyStore) -> Iterator[TestClient]:
    with TestClient(guarded(keys), raise_server_exceptions=False) as client:
        yield client


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_without_keys_everybody_may(client: TestClient) -> None:
    for path in ("/v1/artifacts/a", "/secret", "/metrics", "/livez"):
        assert client.get(path).status_code == 200
    assert client.post(COMPLETE, json={}).json()["tenant"] is None


def test_the_first_key_closes_a_running_server(client: TestClient, keys: KeyStore) -> None:
    assert client.post(COMPLETE, json={}).status_code == 200
    keys.create("first", {"read"})
    assert client.post(COMPLETE, json={}).status_code == 401


def test_probes_and_metrics_need_no_key(client: TestClient, keys: KeyStore) -> None:
    keys.create("first", {"read"})
    assert [client.get(path).status_code for path in ("/livez", "/health", "/metrics")] == [200] * 3


def test_metrics_need_a_key_where_the_setting_says_so(keys: KeyStore) -> None:
    _, token = keys.create("scraper", {"read"})
    with TestClient(guarded(keys, open_metrics=False)) as client:
        assert client.get("/metrics").status_code == 401
        assert client.get("/metrics", headers=bearer(token)).status_code == 200


@pytest.mark.parametrize(
    "sent",
    [{}, {"Authorization": ""}, {"Authorization": "Bearer "}, {"Authorization": "Basic eDp5"}, {"Authorization": "x"}],
)
def test_request_without_a_key_is_401(client: TestClient, keys: KeyStore, sent: dict[str, str]) -> None:
    keys.create("first", {"read"})
    response = client.get("/v1/models", headers=sent)
    assert_refused(response, 401, "AuthenticationError", None, "Authorization: Bearer KEY")
    assert response.headers["www-authenticate"] == "Bearer"


def test_two_authorization_headers_are_401(client: TestClient, keys: KeyStore) -> None:
    _, token = keys.create("first", {"read"})
    header = ("authorization", f"Bearer {token}")
    assert client.get("/v1/models", headers=[header]).status_code == 200
    assert client.get("/v1/models", headers=[header, header]).status_code == 401


def test_unknown_revoked_and_expired_keys_are_401(client: TestClient, keys: KeyStore) -> None:
    key, token = keys.create("first", {"read"})
    _, old = keys.create("old", {"read"}, expires_at=1.0)
    for wrong in ("unknown", token[:-1] + "-"):
        assert_refused(client.get("/v1/models", headers=bearer(wrong)), 401, "AuthenticationError", None, "isn't known")
    assert_refused(client.get("/v1/models", headers=bearer(old)), 401, "AuthenticationError", None, "has expired")
    assert client.get("/v1/models", headers=bearer(token)).status_code == 200
    keys.revoke(key.id)
    assert_refused(client.get("/v1/models", headers=bearer(token)), 401, "AuthenticationError", None, "was revoked")


SCOPED: list[tuple[str, str, set[str]]] = [
    ("POST", COMPLETE, {"generate"}),
    ("GET", "/v1/artifacts/a", {"read"}),
    ("PUT", "/v1/artifacts/a", {"admin"}),
    ("GET", "/v1/models", {"generate", "read", "capture", "inline", "admin"}),
    ("GET", "/secret", {"admin"}),
]


@pytest.mark.parametrize("scope", ["generate", "read", "capture", "inline", "admin"])
def test_each_scope_opens_its_routes_and_no_others(client: TestClient, keys: KeyStore, scope: Any) -> None:
    _, token = keys.create("one", {scope})
    for method, path, scopes in SCOPED:
        response = client.request(method, path, json={}, headers=bearer(token))
        assert response.status_code == (200 if scope in scopes else 403), (method, path)
        if scope not in scopes:
            assert_refused(response, 403, "PermissionDeniedError", None, "needs a key with")


def test_route_without_a_rule_is_for_operators_only(client: TestClient, keys: KeyStore) -> None:
    _, tenants = keys.create("tenant's admin", {"admin"}, tenant="acme")
    _, operators = keys.create("operator", {"admin"})
    assert client.get("/secret", headers=bearer(tenants)).status_code == 403
    assert client.get("/secret", headers=bearer(operators)).status_code == 200


def test_path_that_is_not_there_is_404_for_every_key_and_401_for_nobody(client: TestClient, keys: KeyStore) -> None:
    _, token = keys.create("one", {"generate"})
    assert client.get("/v1/nothing", headers=bearer(token)).status_code == 404
    assert client.get("/v1/nothing").status_code == 401


@pytest.mark.parametrize(
    "path", ["//secret", "/livez/../secret", "/livez%2f..%2fsecret", "/secret/", "/LIVEZ", "/secret;/livez", "/livez/x"]
)
def test_no_spelling_of_a_path_gets_around_the_key(client: TestClient, keys: KeyStore, path: str) -> None:
    keys.create("one", {"admin"})
    response = client.get(path, follow_redirects=False)
    assert response.status_code in (401, 404) and "ok" not in response.text


def test_key_of_vllm_and_admin_key_share_one_mechanism(tmp_path: Path) -> None:
    keys = KeyStore(tmp_path, admin_api_key="boss")
    keys.accept(["user"], with_admin=False)
    with TestClient(guarded(keys)) as client:
        assert client.put("/v1/artifacts/a", headers=bearer("user")).status_code == 403
        assert client.put("/v1/artifacts/a", headers=bearer("boss")).status_code == 200
        assert client.post(COMPLETE, json={}, headers=bearer("user")).status_code == 200


def test_tenant_reaches_the_route_and_ends_with_the_request(client: TestClient, keys: KeyStore) -> None:
    _, acme = keys.create("a", {"generate"}, tenant="acme")
    _, none = keys.create("b", {"generate"})
    for token, tenant in ((acme, "acme"), (none, None), (acme, "acme")):
        assert client.post(COMPLETE, json={}, headers=bearer(token)).json()["tenant"] == tenant


def test_requests_over_the_limit_are_429_with_headers(client: TestClient, keys: KeyStore) -> None:
    _, token = keys.create("slow", {"generate"}, limits=Limits(requests_per_minute=2))
    answers = [client.post(COMPLETE, json={}, headers=bearer(token)) for _ in range(3)]
    assert [each.status_code for each in answers] == [200, 200, 429]
    assert [each.headers["x-ratelimit-remaining-requests"] for each in answers] == ["1", "0", "0"]
    assert {each.headers["x-ratelimit-limit-requests"] for each in answers} == {"2"}
    assert 1 <= int(answers[2].headers["retry-after"]) <= 30
    assert_refused(answers[2], 429, "RateLimitError", None, "2 requests a minute")


def test_tokens_over_the_limit_are_429_for_the_next_request(client: TestClient, keys: KeyStore) -> None:
    _, token = keys.create("slow", {"generate"}, limits=Limits(tokens_per_minute=60))
    first = client.post(COMPLETE, json={"tokens": 90}, headers=bearer(token))
    assert (first.status_code, first.headers["x-ratelimit-remaining-tokens"]) == (200, "60")
    second = client.post(COMPLETE, json={}, headers=bearer(token))
    assert_refused(second, 429, "RateLimitError", None, "60 tokens a minute")
    assert 28 <= int(second.headers["retry-after"]) <= 31, "30 tokens of debt, at one a second"


def test_requests_at_a_time_are_limited_and_counted_out_however_they_end(keys: KeyStore) -> None:
    _, token = keys.create("one at a time", {"generate"}, limits=Limits(max_concurrent=1))
    with TestClient(guarded(keys), raise_server_exceptions=False) as client, ThreadPoolExecutor(4) as pool:

        def ask(body: dict[str, Any]) -> int:
            return client.post(COMPLETE, json=body, headers=bearer(token)).status_code

        statuses = sorted(pool.map(ask, [{"seconds": 0.5}] * 3))
        assert statuses == [200, 429, 429]
        assert ask({"fail": True}) == 500
        assert ask({}) == 200


def test_a_request_is_counted_out_before_its_client_has_the_last_byte(keys: KeyStore) -> None:
    _, token = keys.create("one", {"generate"}, limits=Limits(max_concurrent=1, tokens_per_minute=60))
    app = guarded(keys)
    scope = {
        "type": "http",
        "method": "POST",
        "path": COMPLETE,
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {token}".encode())],
    }
    statuses: list[int] = []

    async def ask(bodies: list[bytes]) -> None:
        async def receive() -> Message:
            return {"type": "http.request", "body": bodies[0]}

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])
            elif not message.get("more_body", False) and bodies[1:]:
                await ask(bodies[1:])  # at once, before the server is done with the one that it has answered

        await app(dict(scope), receive, send)

    asyncio.run(ask([b'{"tokens": 9}', b'{"tokens": 90}', b"{}"]))
    assert statuses == [200, 200, 429], "neither is refused for the one before it; the last is, for its tokens"


def test_other_keys_are_not_slowed_down(client: TestClient, keys: KeyStore) -> None:
    _, slow = keys.create("slow", {"generate"}, limits=Limits(requests_per_minute=1))
    _, free = keys.create("free", {"generate"})
    assert [client.post(COMPLETE, json={}, headers=bearer(slow)).status_code for _ in range(2)] == [200, 429]
    response = client.post(COMPLETE, json={}, headers=bearer(free))
    assert response.status_code == 200 and not [name for name in response.headers if "ratelimit" in name]


def test_keys_that_cannot_be_read_let_nobody_in(client: TestClient, keys: KeyStore, tmp_path: Path) -> None:
    _, token = keys.create("one", {"generate"})
    with sqlite3.connect(tmp_path / FILE) as db:
        db.execute("DROP TABLE keys")
    response = client.post(COMPLETE, json={}, headers=bearer(token))
    assert_refused(response, 503, "ServiceUnavailableError", None, "can't be read")


def test_a_log_on_a_full_disk_costs_no_answer(keys: KeyStore) -> None:
    class Full(Lines):
        def info(self, event: str, **fields: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with TestClient(guarded(keys, lines=Full())) as client:
        assert client.post(COMPLETE, json={}).status_code == 200


def test_log_names_the_key_by_its_id_and_never_the_token_or_the_body(keys: KeyStore) -> None:
    key, token = keys.create("mine", {"generate"}, tenant="acme")
    lines = Lines()
    with TestClient(guarded(keys, lines=lines), raise_server_exceptions=False) as client:
        client.post(f"{COMPLETE}?secret=canary", json={"text": "canary", "tokens": 3}, headers=bearer(token))
        client.post(COMPLETE, json={"text": "canary", "fail": True}, headers=bearer(token))
        client.post(f"/canary/{token}", headers=bearer(token + "canary"))
        client.get("/livez")
    assert "canary" not in str(lines) and token[17:] not in str(lines)
    assert [(line["route"], line["status"]) for line in lines] == [
        (COMPLETE, 200),
        (COMPLETE, 500),
        ("unmatched", 401),
    ]
    assert (lines[0]["key"], lines[0]["tenant"], lines[0]["prompt_tokens"]) == (key.id, "acme", 3)
    assert lines[2]["reject"] == "key_unknown"


@pytest.mark.parametrize("sent", ["", "a b", "x\ty", "ü", "a" * 129, "-x", "{}", "../../etc"])
def test_request_id_that_is_no_word_is_replaced(client: TestClient, sent: str) -> None:
    answer = client.post(COMPLETE, json={}, headers={"X-Request-Id": sent.encode("latin-1")})  # type: ignore[dict-item]
    given = answer.headers["x-request-id"]
    assert given != sent and len(given) == 32
    assert answer.json()["request_id"] == given


def test_request_id_of_the_client_is_kept_and_told_once(client: TestClient) -> None:
    answer = client.post(COMPLETE, json={}, headers={"X-Request-Id": "abc-1.2:3_4"})
    assert answer.headers.get_list("x-request-id") == ["abc-1.2:3_4"]
    assert answer.json()["request_id"] == "abc-1.2:3_4"
