"""The fallback where cache blocks can't be tagged: a salt keeps every block of a request to its program."""

from __future__ import annotations

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


def test_programs_are_kept_apart_by_salt(start_server: Callable[..., Any], tmp_path: Path) -> None:
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
