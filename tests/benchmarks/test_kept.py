"""A benchmark that was interrupted measures only what it hasn't yet, and never takes what other options gave."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("kept").Kept


def test_a_part_is_measured_once_even_by_another_run(kept: Any, tmp_path: Path) -> None:
    runs: list[str] = []

    def measure(name: str) -> Any:
        return lambda: runs.append(name) or {"scores": [1.5, len(runs)]}

    for _ in range(2):
        of_run = kept(tmp_path, "script", {"texts": 5}, 2)
        assert of_run.part("a", measure("a")) == {"scores": [1.5, 1]}
        assert of_run.part("b", measure("b")) == {"scores": [1.5, 2]} and "b" in of_run
    assert runs == ["a", "b"]
    assert kept(tmp_path, "script", {"texts": 6}, 2).part("a", measure("other")) == {"scores": [1.5, 3]}


def test_a_line_that_was_cut_off_is_measured_again(kept: Any, tmp_path: Path) -> None:
    first = kept(tmp_path, "script", {}, 2)
    first.part("a", lambda: 1)
    first.part("b", lambda: 2)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])
    again = kept(tmp_path, "script", {}, 2)
    assert again.part("a", lambda: 7) == 1 and again.part("b", lambda: 8) == 8
    assert kept(tmp_path, "script", {}, 2).part("b", lambda: 9) == 8


def test_it_says_how_long_the_rest_takes(kept: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept(tmp_path, "script", {}, 4).part("a", lambda: 1)
    assert "1 of 4 parts, about 0.0 min left" in capsys.readouterr().out
