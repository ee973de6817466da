from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.api.admin import admit
from server.settings import Settings
from steering_store import Store
from tests.server.api.artifact_app import artifact_app, assert_refused, publish

KEY = "the admin's"
ADMIN = {"Authorization": f"Bearer {KEY}"}
VERSION = "/v1/artifacts/mood/versions/1"
CHANGES: list[tuple[str, str, dict[str, Any]]] = [
    ("POST", "/v1/artifacts/mood/versions", {}),
    ("DELETE", VERSION, {}),
    ("POST", f"{VERSION}/yank", {}),
    ("POST", f"{VERSION}/unyank", {}),
    ("PUT", "/v1/artifacts/mood/aliases/production", {"json": {"version": 1}}),
    ("DELETE", "/v1/artifacts/mood/aliases/production", {}),
]


@pytest.fixture
def client(store: Store) -> Iterator[TestClient]:
    with TestClient(artifact_app(store, KEY)) as client:
        assert publish(client, headers=ADMIN).status_code == 201
        yield client


@pytest.mark.parametrize(("method", "url", "more"), CHANGES)
def test_change_needs_the_admin_key(client: TestClient, method: str, url: str, more: dict[str, Any]) -> None:
    before = client.get("/v1/artifacts/mood").json()
    missing = client.request(method, url, **more)
    assert_refused(missing, 401, "AuthenticationError", None, "admin key")
    assert missing.headers["www-authenticate"] == "Bearer"
    for wrong in ("Bearer other", "Bearer \u00e9", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer "):
        response = client.request(method, url, headers={"Authorization": wrong.encode("latin-1")}, **more)
        assert response.status_code in (401, 403)
        assert KEY not in response.text
    assert client.get("/v1/artifacts/mood").json() == before


def test_every_route_that_changes_something_is_in_the_list_above(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    unsafe = {(method.upper(), path) for path, operations in paths.items() for method in operations if method != "get"}
    names = {"mood": "{name}", "production": "{alias}", "versions/1": "versions/{version}"}
    listed = set()
    for method, url, _ in CHANGES:
        for value, parameter in names.items():
            url = url.replace(value, parameter)
        listed.add((method, url))
    assert unsafe == listed


def test_admin_changes_and_everybody_reads(client: TestClient) -> None:
    assert client.put("/v1/artifacts/mood/aliases/production", json={"version": 1}, headers=ADMIN).status_code == 200
    for url in ("/v1/artifacts", "/v1/artifacts/schema", VERSION, "/v1/artifacts/mood/history", "/v1/artifacts/mood"):
        assert client.get(url).status_code == 200
    assert client.delete("/v1/artifacts/mood/aliases/production", headers=ADMIN).status_code == 204


def test_without_an_admin_key_the_ordinary_one_does(store: Store) -> None:
    with TestClient(artifact_app(store)) as client:
        assert publish(client).status_code == 201


def test_key_is_a_setting_that_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYHELM_ADMIN_API_KEY", KEY)
    settings = Settings()
    assert settings.admin_api_key == KEY
    assert KEY not in repr(settings)
    monkeypatch.setenv("POLYHELM_ADMIN_API_KEY", "")
    with pytest.raises(ValueError, match="admin_api_key"):
        Settings()


def test_admin_key_passes_vllms_own_check_too() -> None:
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    served = FastAPI()
    served.get("/v1/models")(lambda: "ok")
    served.add_middleware(AuthenticationMiddleware, tokens=["user"])
    admit(served, KEY)
    with TestClient(served) as client:
        keys = {"user": 200, KEY: 200, "other": 401}
        for key, status in keys.items():
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == status
