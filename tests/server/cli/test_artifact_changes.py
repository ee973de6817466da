from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from steering_store import Store
from tests.server.cli.artifact_cli import assert_fails, publish_versions, run, run_json


@pytest.fixture(autouse=True)
def three_versions(data_dir: Path) -> Store:
    store = Store(data_dir / "artifacts")
    publish_versions(store, 3)
    return store


def test_alias_is_set_moved_listed_and_deleted() -> None:
    first = run_json("alias", "set", "mood", "production", "1", "--new", "--by", "ada", "--reason", "first")
    assert (first["version"], first["by"]) == (1, "ada")
    assert run_json("show", "mood@production")["aliases"] == ["production"]
    moved = run_json("alias", "set", "mood", "production", "2", "--if-match", first["etag"])
    assert [alias["version"] for alias in run_json("alias", "list", "mood")] == [2]
    assert_fails(run("alias", "set", "mood", "production", "3", "--if-match", first["etag"]), 1, "version 2")
    assert_fails(run("alias", "set", "mood", "production", "3", "--new"), 1, "version 2")
    assert run("alias", "delete", "mood", "production", "--if-match", moved["etag"]).exit_code == 0
    assert run_json("alias", "list", "mood") == []


def test_history_is_for_people_and_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "bob")
    run("alias", "set", "mood", "production", "1", "--reason", "first")
    run("yank", "mood@3")
    entries = run_json("history", "mood")
    assert [(entry["action"], entry["by"], entry["to_version"]) for entry in entries if entry["by"]] == [
        ("set_alias", "bob", 1), ("yank", "bob", 3)
    ]  # fmt: skip
    assert [entry["action"] for entry in entries].count("publish") == 3
    assert run("history", "mood", "--alias", "production").stdout.split("\t")[1:] == [
        "set_alias", "production", "", "1", "bob", "", "first\n"
    ]  # fmt: skip


def test_yanked_version_is_hidden_until_it_is_shown_again() -> None:
    assert run_json("yank", "mood@3")["yanked"]
    assert run_json("list")[0]["ref"] == "mood@2"
    assert run_json("show", "mood@3")["yanked"]
    assert not run_json("unyank", "mood@3")["yanked"]
    assert run_json("list")[0]["ref"] == "mood@3"


def test_deleted_version_is_gone_and_its_files_go_with_the_garbage(data_dir: Path) -> None:
    run("alias", "set", "mood", "production", "1")
    assert_fails(run("delete", "mood@1"), 1, "alias production")
    assert "mood@2 is deleted" in run("delete", "mood@2", "--reason", "a mistake").stdout
    assert_fails(run("show", "mood@2"), 1, "mood@2")
    blobs = data_dir / "artifacts" / "blobs"
    assert run_json("gc")["blobs"] == []
    found = run_json("gc", "--grace-hours", "0")
    assert (len(found["blobs"]), found["dry_run"]) == (1, True)
    assert sum(path.is_file() for path in blobs.rglob("*")) == 3
    assert (
        "1 files of artifacts and 0 unfinished ones were removed" in run("gc", "--grace-hours", "0", "--delete").stdout
    )
    assert sum(path.is_file() for path in blobs.rglob("*")) == 2
    assert run_json("verify")["ok"]


@pytest.mark.parametrize("command", ["yank", "unyank", "delete"])
def test_change_needs_the_version_named(command: str) -> None:
    assert_fails(run(command, "mood"), 2, "mood@3")
    assert_fails(run(command, "mood@9"), 1, "mood@9")


def test_wrong_usage_is_exit_code_2() -> None:
    assert_fails(run("alias", "set", "mood", "production", "x"), 2, "version")
    assert_fails(run("alias", "set", "mood", "production", "1", "--new", "--if-match", "x"), 2, "not both")
    assert_fails(run("alias", "set", "mood", "latest", "1"), 1, "latest")
    assert_fails(run("gc", "--grace-hours", "-1"), 2, "grace")


def test_store_elsewhere_is_changed_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"file://{tmp_path}/shared"
    run("push", "mood@1", "--to", url)
    monkeypatch.setenv("POLYHELM_STORE", url)
    assert run_json("alias", "set", "mood", "production", "1")["version"] == 1
    monkeypatch.setenv("POLYHELM_DATA_DIR", str(tmp_path / "another"))
    assert run_json("show", "mood@production")["version"] == 1
    assert [entry["ref"] for entry in run_json("list")] == ["mood@1"]
    assert not (tmp_path / "another" / "artifacts").exists()
    events: list[Any] = [json.loads(path.read_text()) for path in sorted((tmp_path / "shared/events").iterdir())]
    assert [event["action"] for event in events] == ["publish", "set_alias"]
    assert os.environ["POLYHELM_STORE"] == url
