from __future__ import annotations

import json
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from server.api.authentication import Authentication
from server.api.request_log import RequestLog
from server.keys import SCOPES, Key, KeyStore
from server.request_context import RequestContext, enter
from server.tenants import cache_salt, owner, visible
from steering_store import Store
from tests.server.api.artifact_app import MANIFEST, artifact_app, assert_refused, publish, vector
from tests.server.api.guarded_app import Lines

NAMES = ("mood", "acme--mood", "beta--mood")
PRESET: dict[str, Any] = {
    "schema_version": 1,
    "kind": "preset",
    "model": MANIFEST["model"],
    "default_strength": 1.0,
    "provenance": {"method": "by hand"},
}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


@pytest.fixture
def tokens(keys: KeyStore) -> dict[str | None, dict[str, str]]:
    """An admin key of each tenant, and of none, as headers."""
    made = {tenant: keys.create("x", {"admin", "read"}, tenant=tenant)[1] for tenant in ("acme", "beta", None)}
    return {tenant: {"Authorization": f"Bearer {token}"} for tenant, token in made.items()}


@pytest.fixture
def keys(tmp_path: Path) -> KeyStore:
    return KeyStore(tmp_path)


@pytest.fixture
def client(store: Store, keys: KeyStore, tokens: dict[str | None, dict[str, str]]) -> Iterator[TestClient]:
    app = artifact_app(store)
    app.add_middleware(Authentication, keys=keys)
    app.add_middleware(RequestLog, log=Lines())
    with TestClient(app) as client:
        for index, name in enumerate(NAMES):
            files = {"vectors__safetensors": vector(index + 1)}
            assert publish(client, name, headers=tokens[None], **files).status_code == 201
        yield client


def test_a_name_says_whose_it_is() -> None:
    owners = {"mood": None, "acme--mood": "acme", "a-b--c--d": "a-b", "acme-mood": None, "--x": "", "acme--": "acme"}
    assert {name: owner(name) for name in owners} == owners
    assert all(visible(name, None) for name in owners)
    assert [name for name in owners if visible(name, "acme")] == ["mood", "acme--mood", "acme-mood", "acme--"]


@pytest.mark.parametrize("limit", [1, 2, 100])
def test_list_has_the_own_and_the_shared_ones_page_by_page(client: TestClient, tokens: Any, limit: int) -> None:
    seen = {None: ["acme--mood", "beta--mood", "mood"], "acme": ["acme--mood", "mood"], "beta": ["beta--mood", "mood"]}
    for tenant, names in seen.items():
        found: list[str] = []
        page: dict[str, Any] = {"has_more": True, "last_id": ""}
        while page["has_more"]:
            query = {"limit": limit, "after": page["last_id"]}
            page = client.get("/v1/artifacts", params=query, headers=tokens[tenant]).json()
            found += [each["id"] for each in page["data"]]
        assert found == names


READS = ("", "/versions/1", "/versions/latest", "/versions/1/files/vectors.safetensors", "/aliases", "/history")
CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    ("DELETE", "/versions/1", {}),
    ("POST", "/versions/1/yank", {}),
    ("POST", "/versions/1/unyank", {}),
    ("PUT", "/aliases/production", {"json": {"version": 1}}),
    ("DELETE", "/aliases/production", {}),
]


@pytest.mark.parametrize("path", READS)
def test_others_artifacts_read_as_if_they_were_not_there(client: TestClient, tokens: Any, path: str) -> None:
    for tenant, name in (("acme", "acme--mood"), ("acme", "mood"), (None, "beta--mood")):
        assert client.get(f"/v1/artifacts/{name}{path}", headers=tokens[tenant]).status_code == 200
    other = client.get(f"/v1/artifacts/beta--mood{path}", headers=tokens["acme"])
    missing = client.get(f"/v1/artifacts/beta--none{path}", headers=tokens["acme"])
    assert other.status_code == missing.status_code == 404
    assert other.json()["error"]["message"].replace("beta--mood", "X") == missing.json()["error"]["message"].replace(
        "beta--none", "X"
    )


@pytest.mark.parametrize(("method", "path", "more"), CHANGES)
def test_a_tenant_changes_its_own_artifacts_only(
    client: TestClient, tokens: Any, store: Store, method: str, path: str, more: dict[str, Any]
) -> None:
    for name in NAMES:
        store.set_alias(name, "production", 1)
    if method == "DELETE" and "versions" in path:
        for name in NAMES:
            store.delete_alias(name, "production")
    url = f"/v1/artifacts/{{}}{path}"
    shared = client.request(method, url.format("mood"), headers=tokens["acme"], **more)
    assert_refused(shared, 403, "PermissionDeniedError", "name", "acme--")
    assert client.request(method, url.format("beta--mood"), headers=tokens["acme"], **more).status_code == 404
    for tenant, name in (("acme", "acme--mood"), (None, "mood"), (None, "beta--mood")):
        assert client.request(method, url.format(name), headers=tokens[tenant], **more).status_code in (200, 201, 204)


def test_a_tenant_publishes_under_its_own_names_only(client: TestClient, tokens: Any) -> None:
    for name in ("new", "beta--new", "acme-new", "acme"):
        assert_refused(publish(client, name, headers=tokens["acme"]), 403, "PermissionDeniedError", "name", "acme--")
    assert publish(client, "acme--new", headers=tokens["acme"]).status_code == 201


def test_a_preset_holds_nothing_that_its_tenant_may_not_see(client: TestClient, tokens: Any) -> None:
    def preset(name: str, artifact: str, condition: str | None = None) -> Any:
        item: dict[str, Any] = {"artifact": artifact}
        if condition:
            item["options"] = {"condition": {"artifact": condition, "threshold": 0.5}}
        manifest = PRESET | {"interventions": [item]}
        parts = [("manifest", (None, json.dumps(manifest)))]
        return client.post(f"/v1/artifacts/{name}/versions", files=parts, headers=tokens["acme"])

    for number, (artifact, condition) in enumerate([("beta--mood", None), ("mood", "beta--mood")]):
        refused = preset(f"acme--p{number}", artifact, condition)
        missing = preset(f"acme--p{number}", artifact.replace("beta--mood", "beta--none"), condition and "beta--none")
        assert refused.status_code == missing.status_code == 404
        assert refused.text.replace("beta--mood", "X") == missing.text.replace("beta--none", "X")
    assert preset("acme--p", "mood", "acme--mood").status_code == 201


def test_history_says_whose_key_it_was_whatever_the_caller_says(
    client: TestClient, tokens: Any, keys: KeyStore, store: Store
) -> None:
    name, headers = "acme--mood", tokens["acme"]
    said = {"by": "somebody else", "reason": "why not"}
    assert publish(client, "acme--new", headers=headers).status_code == 201
    url = f"/v1/artifacts/{name}"
    client.put(f"{url}/aliases/a", json={"version": 1, **said}, headers=headers)
    moved = client.get(f"{url}/aliases/a", headers=headers).json()
    client.delete(f"{url}/aliases/a", params=said, headers=headers)
    client.post(f"{url}/versions/1/yank", json=said, headers=headers)
    client.post(f"{url}/versions/1/unyank", json=said, headers=headers)
    client.delete(f"{url}/versions/1", params=said, headers=headers)
    (key,) = (key for key in keys.list() if key.tenant == "acme")
    by = f"key {key.id} (x)"
    history = client.get(f"{url}/history", headers=headers).json()["data"][1:]
    assert [entry["action"] for entry in history] == ["set_alias", "delete_alias", "yank", "unyank", "delete"]
    assert {(entry["by"], entry["note"], entry["reason"]) for entry in [*history, moved]} == {(by, *said.values())}
    (published,) = store.history("acme--new")
    assert (published.action, published.to_version, published.by, published.note) == ("publish", 1, by, None)


def test_salts_of_the_prefix_cache_keep_tenants_apart() -> None:
    def salt(tenant: str | None, sent: str | None) -> str | None:
        def inside() -> str | None:
            enter(RequestContext(key=Key("1", "", SCOPES, tenant)))
            return cache_salt(sent)

        return copy_context().run(inside)

    assert salt(None, None) is None, "without tenants everybody shares"
    made = [salt(tenant, sent) for tenant in (None, "acme", "beta") for sent in (None, "", "x", "acme", "acme\0", "\0")]
    made = [each for each in made if each is not None]
    # An empty salt is none: each tenant's first two are the same, and nobody else's.
    assert len(set(made)) == len(made) - 2
