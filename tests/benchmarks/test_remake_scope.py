"""The table of docs/remake.md is what the results say."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_the_table_of_the_page_is_that_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    script = importlib.import_module("remake_scope")
    results = json.loads((ROOT / "benchmarks" / "results" / "remake_scope.json").read_text("utf-8"))
    section = script.section(results)
    assert section in (ROOT / "docs" / "remake.md").read_text("utf-8")
    for name, goal in script.GOALS.items():
        assert results["goals"][name] == goal
    results["deciders"]["head"]["from_english"]["src"] = 0.1234
    assert "| 12.3 / " in script.section(results), "a goal that isn't reached isn't bold"
