"""The artifact routes in an app of their own, and what the tests publish there."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx import Response
from safetensors.numpy import save

from server.api import aliases, artifact_files, artifacts, errors
from server.api.leases import Leases
from server.settings import Settings
from steering_store import Store

FILE = "vectors.safetensors"
MANIFEST: dict[str, Any] = {
    "schema_version": 1,
    "kind": "steering_vector",
    "model": {"architecture": "LlamaForCausalLM", "hidden_size": 8, "num_layers": 4},
    "sites": [{"point": "resid_post", "layer": 2, "file": FILE, "tensor": "layer.2", "shape": [8], "dtype": "F32"}],
    "default_strength": 4.0,
    "provenance": {"method": "caa"},
}


def artifact_app(store: Store) -> FastAPI:
    app = FastAPI()
    settings = Settings()
    app.state.polyhelm = SimpleNamespace(store=store, settings=settings, leases=Leases(store))
    for module in (aliases, artifact_files, artifacts):
        app.include_router(module.router)
    errors.install(app)
    return app


def vector(fill: float = 1.0) -> bytes:
    return save({"layer.2": np.full(8, fill, np.float32)})


def publish(
    client: TestClient,
    name: str = "mood",
    manifest: Any = MANIFEST,
    headers: dict[str, str] | None = None,
    **files: bytes,
) -> Any:
    parts = [("files", (path.replace("__", "."), content)) for path, content in files.items()] or [
        ("files", (FILE, vector()))
    ]
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    return client.post(f"/v1/artifacts/{name}/versions", data={"manifest": text}, files=parts, headers=headers)


def publish_versions(client: TestClient, count: int, name: str = "mood") -> None:
    for number in range(count):
        assert publish(client, name, vectors__safetensors=vector(number + 1)).status_code == 201


def assert_refused(response: Response, status: int, kind: str, param: str | None, *words: str) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["type"], error["param"]) == (status, status, kind, param)
    assert error.keys() == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"]
