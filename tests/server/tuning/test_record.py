from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.tuning.record import Record
from steering_store.tuning import Scores

SCORES = Scores(effect=0.5, accuracy=0.5, margin=-1.0, perplexity=12.0, distinct_2=0.75)


def test_points_are_there_after_a_restart_and_only_for_the_same_identity(tmp_path: Path) -> None:
    file = tmp_path / "tuning.jsonl"
    record = Record(file, "one")
    record.add({"top_k": 2}, [3, 4], 1.5, SCORES)
    again = Record(file, "one")
    assert again.get({"top_k": 2}, [3, 4], 1.5) == SCORES
    assert again.get({"top_k": 2}, [3, 4], 1.0) is None and again.get({}, [3, 4], 1.5) is None
    assert Record(file, "two").get({"top_k": 2}, [3, 4], 1.5) is None
    assert [json.loads(line) for line in file.read_text().splitlines()] == [{"identity": "two"}]


def test_a_line_that_a_crash_cut_off_is_measured_again_and_swallows_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tuning.jsonl"
    record = Record(file, "one")
    for strength in (1.0, 2.0, 3.0):
        record.add({}, [3], strength, SCORES)
    content = file.read_bytes()
    last = len(content) - len(content.splitlines(keepends=True)[-1])
    for cut in range(last, len(content)):
        file.write_bytes(content[:cut])
        again = Record(file, "one")
        assert again.get({}, [3], 2.0) == SCORES and again.get({}, [3], 3.0) is None
        again.add({}, [3], 3.0, SCORES)
        assert file.read_bytes() == content


@pytest.mark.parametrize("cut", [0, 1, 5, 16])
def test_a_header_that_a_crash_cut_off_begins_anew(tmp_path: Path, cut: int) -> None:
    file = tmp_path / "tuning.jsonl"
    Record(file, "one").add({}, [3], 1.0, SCORES)
    file.write_bytes(file.read_bytes()[:cut])
    Record(file, "one").add({}, [3], 2.0, SCORES)
    assert Record(file, "one").get({}, [3], 2.0) == SCORES
