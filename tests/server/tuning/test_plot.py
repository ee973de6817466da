from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.tuning.plot import draw, drawn, series, write_jsonl
from steering_store.tuning import Scores, Tuning, TuningPoint


def point(strength: float, layers: list[int], perplexity: float | None = 9.0, **fields: Any) -> TuningPoint:
    scores = {"effect": strength / 10, "perplexity": perplexity, "distinct_2": 0.9, "fluent": perplexity is not None}
    return TuningPoint(strength=strength, layers=layers, **(scores | fields))


POINTS = [
    point(2.0, [3, 4, 5]),
    point(1.0, [3, 4, 5]),
    point(1.0, [7], perplexity=None),
    point(2.0, [1, 7], options={"top_k": 4}),
]


@pytest.fixture
def tuning() -> Tuning:
    return Tuning(
        data="task.jsonl",
        sha256="0" * 64,
        rows=3,
        form="target",
        split=["dev"],
        objective="log_prob",
        max_perplexity_ratio=2.0,
        baseline=Scores(effect=0.0, perplexity=8.0, distinct_2=1.0),
        points=POINTS,
        chosen=0,
    )


def test_the_curve_is_written_with_its_baseline_and_the_chosen_point(tuning: Tuning, tmp_path: Path) -> None:
    write_jsonl(tuning, tmp_path / "curve.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert rows[0] == {"baseline": True, "effect": 0.0, "perplexity": 8.0, "distinct_2": 1.0}
    assert [row["chosen"] for row in rows[1:]] == [True, False, False, False]
    assert [TuningPoint.model_validate({k: v for k, v in row.items() if k != "chosen"}) for row in rows[1:]] == POINTS


def test_a_line_of_the_picture_is_a_set_of_layers_and_options_by_strength(tuning: Tuning) -> None:
    found = series(tuning)
    assert list(found) == ["layers 3-5", "layers 7", "layers 1,7 top_k=4"]
    assert [each.strength for each in found["layers 3-5"]] == [1.0, 2.0]


def test_the_picture_has_effect_against_fluency_and_the_heat_map(tuning: Tuning) -> None:
    pytest.importorskip("matplotlib")
    figure = drawn(tuning, "mood")
    fluency, heat, *_ = figure.axes
    lines = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in fluency.get_lines()}
    assert lines["layers 3-5"] == [(9.0, 0.1), (9.0, 0.2)] and lines["layers 1,7 top_k=4"] == [(9.0, 0.2)]
    assert lines["layers 7"] == [], "an infinite perplexity has no place"
    assert lines["unsteered"] == [(8.0, 0.0)] and lines["chosen"] == [(9.0, 0.2)]
    limit = tuning.max_perplexity_ratio * 8.0
    assert [limit, limit] in [list(line.get_xdata()) for line in fluency.get_lines()], "what counts as fluent"
    (image,) = heat.get_images()
    np.testing.assert_array_equal(image.get_array().filled(np.nan), [[0.1, 0.2], [0.1, np.nan], [np.nan, 0.2]])
    assert [text.get_text() for text in heat.get_yticklabels()] == list(series(tuning))
    assert [text.get_text() for text in heat.get_xticklabels()] == ["1", "2"]
    marks = {(text.get_text(), *text.get_position()) for text in heat.texts}
    assert marks == {("o", 1, 0), ("x", 0, 1)}, "the chosen point, and the one that isn't fluent"


def test_it_is_drawn_where_matplotlib_is_installed(
    tuning: Tuning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    assert draw(tuning, "mood", tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr("server.tuning.plot.find_spec", lambda name: None)
    assert not draw(tuning, "mood", tmp_path / "other.png") and not (tmp_path / "other.png").exists()
