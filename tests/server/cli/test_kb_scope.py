"""`polyhelm kb train-scope`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kb import encoders
from kb.scope import ScopeError
from kb.scope.storage import load
from server.cli import app
from tests.kb.ngrams import Ngrams
from tests.kb.scope.cross_encoders import untrained
from tests.kb.scope.questions import aside, groups


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


@pytest.fixture
def small_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one that takes no time."""
    monkeypatch.setattr(encoders, "load", lambda name: Ngrams(name))


@pytest.mark.usefixtures("small_encoder")
def test_a_head_is_trained_and_knows_its_encoder(questions: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scope"
    code, printed, message = run(questions, "--output", folder, "--json")
    assert code == 0, message
    decider = load(folder)
    assert json.loads(printed)["kind"] == decider.name == "head"
    assert decider.encoder == Ngrams("e5-small").identity
    assert json.loads(printed)["held_out"]["out_of_scope"] is None


@pytest.mark.usefixtures("small_encoder")
def test_questions_out_of_scope_are_learned_from_and_counted_apart(questions: Path, tmp_path: Path) -> None:
    with questions.open("a", encoding="utf-8") as file:
        for text, language in aside(groups(60, seed=3), seed=4):
            file.write("\n" + json.dumps({"out_of_scope": {language: text}}, ensure_ascii=False))
    code, printed, message = run(questions, "--output", tmp_path / "scope")
    assert code == 0, message
    assert "on questions out of scope" in printed
    notes = json.loads((tmp_path / "scope" / "scope.json").read_text())["notes"]
    assert notes["lines"] == notes["out_of_scope"] == 60 and 0 <= notes["held_out"]["out_of_scope"] <= 0.5


@pytest.mark.usefixtures("small_encoder")
@pytest.mark.parametrize(("kind", "name"), [("cross-encoder", "cross_encoder"), ("cascade", "cascade")])
def test_what_reads_is_trained_from_a_folder(questions: Path, tmp_path: Path, kind: str, name: str) -> None:
    pytest.importorskip("sentence_transformers")
    tiny = untrained(tmp_path / "tiny", questions.read_text().lower().split())
    folder = tmp_path / "scope"
    code, printed, message = run(questions, "--output", folder, "--kind", kind, "--model", tiny, "--json")
    assert code == 0, message
    assert json.loads(printed)["kind"] == load(folder).name == name


def test_what_cannot_be_trained_says_why(questions: Path, tmp_path: Path) -> None:
    for arguments, reason in (
        ((tmp_path / "nothing", "--output", tmp_path / "a"), "nothing"),
        ((questions, "--output", tmp_path / "a", "--kind", "cross-encoder", "--model", tmp_path / "none"), "none"),
        ((questions, "--output", tmp_path / "a", "--encoder", "e5-huge"), "e5-huge"),
    ):
        code, _, message = run(*arguments)
        assert code == 1 and reason in message
        with pytest.raises(ScopeError):
            load(tmp_path / "a")
    assert run(questions, "--output", tmp_path / "a", "--kind", "oracle")[0] == 2
