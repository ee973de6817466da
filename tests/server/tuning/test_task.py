from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from server.tuning.task import Item, Tune, TuneError, digest_of

CHOICES = {"prompt": "Is fire hot?", "choices": [" yes", " no"], "answer": 0, "split": "validation"}
TARGET = {"prompt": "The capital of France is", "target": " Paris", "split": "dev"}
LABEL = {"prompt": "Bonjour", "label": "fr", "scorer": "language", "split": "validation"}


def tune(*items: dict[str, Any], **fields: Any) -> Tune:
    return Tune.model_validate({"items": list(items) or [CHOICES], "strengths": [1.0]} | fields)


@pytest.mark.parametrize(("item", "form"), [(CHOICES, "choices"), (TARGET, "target"), (LABEL, "label")])
def test_an_item_has_one_of_three_forms(item: dict[str, Any], form: str) -> None:
    assert tune(item).form == form
    assert Tune.model_validate_json(tune(item).model_dump_json()) == tune(item)


@pytest.mark.parametrize(
    ("item", "word"),
    [
        (CHOICES | {"split": "test"}, "never tune on the test split"),
        (CHOICES | {"split": "train"}, "isn't for tuning"),
        ({key: value for key, value in CHOICES.items() if key != "split"}, "Field required"),
        (CHOICES | {"answer": 2}, "none of the 2 choices"),
        (CHOICES | {"answer": -1}, "none of the 2 choices"),
        ({key: value for key, value in CHOICES.items() if key != "answer"}, "answer is missing"),
        (CHOICES | {"choices": [" yes"]}, "at least 2"),
        (CHOICES | {"target": " x"}, "either"),
        ({"prompt": "x", "split": "dev"}, "either"),
        (LABEL | {"scorer": "judge"}, "contains"),
        (TARGET | {"prompt": ""}, "at least 1"),
        (TARGET | {"note": "x"}, "Extra inputs"),
    ],
)
def test_a_malformed_item_is_refused(item: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        tune(item)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"strengths": []}, "at least 1"),
        ({"strengths": [1.0, 1.0]}, "once"),
        ({"strengths": [0.0]}, "baseline"),
        ({"strengths": [float("nan")]}, "finite"),
        ({"layers": [[1, 1]]}, "once"),
        ({"layers": [[1, 2], [2, 1]]}, "once"),
        ({"layers": [[]]}, "at least 1"),
        ({"strengths": [float(each) for each in range(1, 101)], "options": {"top_k": list(range(6))}}, "600 points"),
        ({"intervention": {"strength": 2}}, "can't be here"),
        ({"intervention": {"condition": {}}}, "can't be here"),
        ({"test": ["abc"]}, "match pattern"),
    ],
)
def test_a_malformed_grid_is_refused(fields: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        tune(**fields)


def test_items_of_two_forms_and_a_margin_without_choices_are_refused() -> None:
    with pytest.raises(ValidationError, match="one form"):
        tune(CHOICES, TARGET)
    with pytest.raises(ValidationError, match="margin is for choices"):
        tune(TARGET, objective="margin")


def test_variants_are_all_combinations_of_the_options() -> None:
    found = [each.options for each in tune(options={"top_k": [2, 4], "form": ["fixed", "adaptive"]}).variants()]
    assert len(found) == 4 and {"top_k": 4, "form": "fixed"} in found
    assert [each.options for each in tune().variants()] == [{}]


def test_an_item_is_the_same_under_another_split_and_another_one_is_not() -> None:
    relabelled = Item.model_validate(CHOICES | {"split": "dev"})
    assert relabelled.digest == Item.model_validate(CHOICES).digest
    assert Item.model_validate(CHOICES | {"answer": 1}).digest != relabelled.digest


def test_what_the_test_set_or_the_fit_has_cannot_be_tuned_on() -> None:
    digests = [Item.model_validate(each).digest for each in (TARGET, CHOICES)]
    with pytest.raises(TuneError, match="test set") as refused:
        tune(CHOICES, CHOICES | {"prompt": "Is it?"}, test=digests).check_unseen([])
    assert refused.value.field == "tune.items.0"
    assert tune(test=digests).digest == digest_of(digests[1:])
    for text in ("Is fire hot? yes", "Is  fire hot?", "Is fire hot? no"):
        with pytest.raises(TuneError, match="fit's own data"):
            tune().check_unseen(["else", text])
    tune().check_unseen(["Is fire hot? maybe", "Is"])
