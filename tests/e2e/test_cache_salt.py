"""The fallback for blocks that can't be tagged, and a fit that a shutdown cuts off: one server of its own for both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

pytestmark = pytest.mark.engine

PROMPT = "The quick brown fox jumps over the lazy dog. " * 12
FLAGS = ("--prefix-cache", "cache_salt", "--enable-prompt-tokens-details")


def cached(server: Server, strength: float | None = None, **fields: object) -> int:
    """Prompt tokens that the prefix cache held."""
    interventions = [] if strength is None else [{"artifact": "salt", "strength": strength}]
    answer = server.complete(*interventions, prompt=PROMPT, max_tokens=4, **fields)
    return int((answer["usage"]["prompt_tokens_details"] or {}).get("cached_tokens") or 0)


def test_salt_keeps_programs_apart_and_a_fit_outlives_a_shutdown(
    start_server: Callable[..., Any], pairs: list[dict[str, str]], tmp_path: Path
) -> None:
    with start_server(tmp_path / "data", *FLAGS) as server:
        assert server.capabilities["prefix_cache"] == "cache_salt"
        server.publish("salt")
        assert cached(server) == 0
        shared = cached(server)
        assert shared > 0
        assert cached(server, 2.0) == 0, "a steered request used blocks of an unsteered one"
        assert cached(server, 2.0) == shared
        assert cached(server, 3.0) == 0, "a strength used blocks of another one"
        assert cached(server, 2.0, cache_salt="mine") == 0, "a client's own salt must count"
        assert cached(server) == shared
        fit_id = submit_fit(server, pairs * 10)
        server.wait_for_fit(fit_id, "running")
    # SIGTERM ended the server in the middle of the fit.
    record = json.loads(next((tmp_path / "data" / "fits").glob("*.json")).read_text())
    assert record["job"]["status"] in ("queued", "running")
    with start_server(tmp_path / "data") as server:
        assert server.capabilities["prefix_cache"] == "tagged"
        assert server.wait_for_fit(fit_id, "succeeded", "failed")["status"] == "succeeded"
        assert len(server.client.get("/v1/artifacts/cut-off").json()["versions"]) == 1


def submit_fit(server: Server, pairs: list[dict[str, str]]) -> str:
    response = server.client.post("/v1/fits", json={"method": "caa", "name": "cut-off", "pairs": pairs})
    assert response.status_code == 202, response.text
    return str(response.json()["id"])
