from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer

from server.cli.tuning import TuningOptions, spec_of
from server.tuning.task import Item, Tune

ITEM = {"prompt": "Is fire hot?", "choices": [" yes", " no"], "answer": 0, "split": "dev"}


def given(tmp_path: Path, **fields: Any) -> TuningOptions:
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps(ITEM))
    return TuningOptions(**(dict.fromkeys(TuningOptions._fields) | {"tune": task} | fields))  # type: ignore[arg-type]


def test_options_become_a_tune(tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps(ITEM | {"prompt": "Is ice hot?", "split": "test"}))
    options = given(
        tmp_path,
        tune_strengths="-1,0.5",
        tune_layers=["3-5", "7"],
        tune_option=["top_k=2,4", "pooling=mean", "affine=true,false"],
        tune_mode="frozen",
        tune_intervention='{"op": "add_norm"}',
        tune_perplexity=3.0,
        test=test,
    )
    tune = Tune.model_validate(spec_of(options, None))
    assert (tune.strengths, tune.layers, tune.mode) == ([-1.0, 0.5], [[3, 4, 5], [7]], "frozen")
    assert tune.options == {"top_k": [2, 4], "pooling": ["mean"], "affine": [True, False]}
    assert (tune.intervention, tune.max_perplexity_ratio, tune.data.name) == ({"op": "add_norm"}, 3.0, "task.jsonl")
    assert tune.test == [Item.model_validate(ITEM | {"prompt": "Is ice hot?"}).digest]


def test_strengths_are_multiples_of_the_fits_own_unless_given(tmp_path: Path) -> None:
    for default, unit in ((None, 1.0), (4.0, 4.0), (-1.0, -1.0)):
        tune = spec_of(given(tmp_path), default)
        assert tune is not None and tune["strengths"] == [unit * each for each in (0.25, 0.5, 1.0, 2.0, 4.0)]


def test_without_a_task_there_is_no_tuning_and_its_options_are_refused(tmp_path: Path) -> None:
    assert spec_of(given(tmp_path, tune=None), None) is None
    with pytest.raises(typer.BadParameter, match="give --tune"):
        spec_of(given(tmp_path, tune=None, tune_layers=["3"]), None)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tune_strengths": "1,x"}, "aren't numbers"),
        ({"tune_layers": ["a"]}, "names no layers"),
        ({"tune_option": ["top_k"]}, "write it as"),
        ({"tune_option": ["=3"]}, "write it as"),
        ({"tune_intervention": "{"}, "not JSON"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(typer.BadParameter, match=word):
        spec_of(given(tmp_path, **fields), None)


def test_a_test_set_that_is_no_task_is_refused_by_its_item(tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps(ITEM) + "\n" + json.dumps({"prompt": "x"}))
    with pytest.raises(typer.BadParameter, match="item 1"):
        spec_of(given(tmp_path, test=test), None)
