from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.keys import KeyStore


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POLYHELM_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


def run(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["key", *arguments])
    assert done.exit_code == code, done.output
    return done.stdout if code == 0 else done.stderr


def run_json(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json"))


def test_created_key_is_printed_once_and_works(data_dir: Path) -> None:
    token = run("create", "ci").strip()
    key = KeyStore(data_dir).find(token)
    assert key is not None and key.scopes == {"generate", "read"} and key.problem() is None
    assert token not in run("list") and token[17:] not in run("list", "--json")
    assert run("list").startswith(f"{key.id}\tci\tgenerate, read\t\t")


def test_key_has_the_scopes_tenant_limits_and_end_that_were_asked_for(data_dir: Path) -> None:
    limits = ("--requests-per-minute", "5", "--tokens-per-minute", "6", "--max-concurrent", "7")
    made = run_json("create", "x", "--scope", "admin", "--scope", "capture", "--tenant", "acme", "--days", "2", *limits)
    key = KeyStore(data_dir).find(made["key"])
    assert key is not None
    assert (key.scopes, key.tenant) == ({"admin", "capture"}, "acme")
    assert (key.limits.requests_per_minute, key.limits.tokens_per_minute, key.limits.max_concurrent) == (5, 6, 7)
    assert key.expires_at is not None and abs(key.expires_at - key.created_at - 2 * 86400) < 60
    (listed,) = run_json("list")
    assert listed == {name: value for name, value in made.items() if name != "key"}


def test_revoked_key_is_listed_as_such(data_dir: Path) -> None:
    made = run_json("create", "x")
    assert "is revoked" in run("revoke", made["id"])
    assert [each["state"] for each in run_json("list")] == ["was revoked"]


def test_what_cannot_be_done_is_an_error_and_a_word(data_dir: Path) -> None:
    assert "no keys in" in run("list", code=1)
    assert "no keys in" in run("revoke", "x", code=1)
    assert not data_dir.exists()
    run("create", "x")
    assert "no key 'nobody'" in run("revoke", "nobody", code=1)
    assert "not allowed" in run("create", "x", "--tenant", "A--b", code=1)
    assert "root" in run("create", "x", "--scope", "root", code=2)
    assert len(run_json("list")) == 1
