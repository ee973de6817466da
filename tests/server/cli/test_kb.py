"""`polyhelm kb` on a data folder."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from kb import encoders
from kb.backends.sqlite import database
from server.cli.kb import app
from tests.kb.ngrams import Ngrams


@pytest.fixture(autouse=True)
def small_encoder(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "load", lambda name: Ngrams(name))


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, arguments, input=stdin)


def run_json(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def assert_fails(result: Result, word: str) -> None:
    assert result.exit_code == 1, result.output
    assert word in result.stderr, result.stderr
    assert isinstance(result.exception, SystemExit)


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    facts = [{"id": f"f{n}", "question": f"Who is {n}?", "answer": f"Agent {n}", "language": "en"} for n in range(9)]
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return path


def test_facts_are_imported_once_found_exported_and_imported_elsewhere(facts: Path, tmp_path: Path) -> None:
    assert run_json("import", "agents", str(facts))["created"] == 9
    assert run_json("import", "agents", str(facts))["unchanged"] == 9
    (hit,) = run_json("query", "agents", "Who is 7?", "--top-k", "1")
    assert hit["fact"]["answer"] == "Agent 7" and hit["score"] == pytest.approx(1, abs=1e-5)
    assert run_json("query", "agents", "Who is 7?", "--language", "fr") == []
    copy = tmp_path / "copy.jsonl"
    assert run("export", "agents", str(copy), "--embeddings").exit_code == 0
    lines = [json.loads(line) for line in copy.read_text().splitlines()]
    assert len(lines) == 9 and len(lines[0]["embedding"]) == 64
    elsewhere = str(tmp_path / "elsewhere")
    assert run_json("import", "agents", str(copy), "--data-dir", elsewhere)["created"] == 9
    assert run("export", "agents", "--data-dir", elsewhere).stdout.splitlines() == [
        json.dumps({key: value for key, value in line.items() if key != "embedding"}) for line in lines
    ]
    rebuilt = run_json("rebuild", "agents")
    assert (rebuilt["facts"], rebuilt["snapshot"]["facts"]) == (9, 9)
    (stats,) = run_json("stats")
    assert (stats["collection"], stats["facts"], stats["encoder"]["name"]) == ("agents", 9, "e5-small")
    assert "agents\t9\t0\t9\te5-small\tsupersede" in run("stats", "agents").stdout
    assert "Agent 7" in run("query", "agents", "Who is 7?").stdout


def test_lines_at_fault_are_said_and_the_others_written() -> None:
    lines = '{"id": "a", "text": "one"}\nno\n{"id": "b", "text": "two"}\n{"id": "c", "te'
    result = run("import", "agents", "-", stdin=lines)
    assert_fails(result, "error: line 2: not a JSON object")
    assert "error: line 4: the stream ends in the middle" in result.stderr
    assert "2 created" in result.stdout
    result = run("import", "agents", "-", "--json", stdin="[]")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["errors"][0]["line"] == 1


def test_what_is_not_there_or_does_not_fit_is_said(facts: Path, tmp_path: Path) -> None:
    assert_fails(run("query", "agents", "x"), "no knowledge base in")
    assert_fails(run("import", "agents", str(tmp_path / "none")), "No such file")
    assert_fails(run("import", "agents", str(facts), "--no-create"), "no knowledge base in")
    assert_fails(run("import", "UPPER", str(facts)), "a-z")
    assert run("import", "agents", str(facts)).exit_code == 0
    assert_fails(run("import", "others", str(facts), "--no-create"), "no collection 'others'")
    assert_fails(run("query", "agents", "x", "--encoder", "other"), "name that one with --encoder")
    assert_fails(run("stats", "agents", "--url", "mysql://x"), "postgresql://")
    more = tmp_path / "more.jsonl"
    vector = np.ones(64).tolist()
    more.write_text(json.dumps({"text": "with", "embedding": vector}) + "\n")
    assert run("import", "agents", str(more), "--encoder", "other").exit_code == 0
    more.write_text(json.dumps({"text": "without"}) + "\n")
    assert_fails(run("import", "agents", str(more), "--encoder", "other"), "is of encoder 'e5-small'")


def test_a_full_disk_is_said_and_what_was_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own limit: beyond it, every write fails as on a disk that is full."""
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"id": f"f{n}", "text": f"{n} " + "x" * 2000}) + "\n" for n in range(3000)))
    connect = database._connect

    def without_room(path: Path) -> sqlite3.Connection:
        db = connect(path)
        db.execute("PRAGMA max_page_count = 300")
        return db

    with monkeypatch.context() as patch:
        patch.setattr(database, "_connect", without_room)
        result = run("import", "agents", str(path), "--json")
        assert_fails(result, "free some room")
    written = json.loads(result.stdout)["created"]
    assert 0 < written < 3000
    (stats,) = run_json("stats")
    assert stats["facts"] == written
    assert run_json("import", "agents", str(path))["created"] == 3000 - written
