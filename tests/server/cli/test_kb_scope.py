"""`polyhelm kb train-scope`, with the real encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kb.scope import ScopeError
from kb.scope.storage import load
from server.cli import app
from tests.kb.scope.questions import groups


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    lines = [{"questions": {language: text for text, language in group.questions}} for group in groups(60, seed=3)]
    file.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    return file


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["kb", "train-scope", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_a_trained_decider_can_be_served_and_is_not_written_over(questions: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scope"
    code, printed, _ = run(questions, "--output", folder, "--kind", "threshold", "--json")
    assert code == 0
    answer = json.loads(printed)
    decider = load(folder)
    assert answer["kind"] == decider.name == "threshold" and decider.encoder is not None
    assert decider.encoder.name == "e5-small"
    assert 0 <= answer["held_out"]["false_fires"] <= 0.5
    assert json.loads((folder / "scope.json").read_text())["notes"]["held_out"] == answer["held_out"]
    code, _, message = run(questions, "--output", folder, "--kind", "threshold")
    assert code == 1 and "already" in message


def test_what_cannot_be_trained_says_why(questions: Path, tmp_path: Path) -> None:
    for arguments, reason in (
        ((tmp_path / "nothing", "--output", tmp_path / "a"), "nothing"),
        ((questions, "--output", tmp_path / "a", "--kind", "cross-encoder"), "--model"),
        ((questions, "--output", tmp_path / "a", "--encoder", "e5-huge"), "e5-huge"),
    ):
        code, _, message = run(*arguments)
        assert code == 1 and reason in message
        with pytest.raises(ScopeError):
            load(tmp_path / "a")
    assert run(questions, "--output", tmp_path / "a", "--kind", "oracle")[0] == 2
