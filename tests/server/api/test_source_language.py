"""A preset that serves any of some languages: which intervention a request gets, and why."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from server.api.errors import ApiError
from server.api.source_language import matching, prompts_of
from server.api.steering import Steerer
from steering_store import Store
from tests.server.api.published import prepare, publish, receipt, vectors
from tests.server.api.test_presets import publish_preset

GERMAN, FRENCH = "Wie komme ich von hier zum Bahnhof?", "Comment aller à la gare depuis ici ?"
ENGLISH = "How do I get to the station from here?"
PRESET = {"interventions": [{"artifact": "any-en"}]}


@pytest.fixture(autouse=True)
def artifacts(store: Store) -> None:
    for name, fill, alpha in (("de-en", 1.0, 0.3), ("fr-en", 2.0, 0.5), ("polite", 3.0, 1.0)):
        publish(store, name, vectors(fill), default_strength=alpha)
    items: list[dict[str, Any]] = [
        {"artifact": "de-en", "source_language": "de"},
        {"artifact": "fr-en", "source_language": "fr-FR", "strength": 0.7},
        {"artifact": "polite"},
    ]
    publish_preset(store, *items, name="any-en")


@pytest.mark.parametrize(
    ("named", "prompt", "tag", "by", "applied"),
    [
        ("de", None, "de", "request", [("de-en", 0.3), ("polite", 1.0)]),
        ("FR", None, "fr-FR", "request", [("fr-en", 0.7), ("polite", 1.0)]),
        ("de-AT", None, "de", "request", [("de-en", 0.3), ("polite", 1.0)]),
        (None, GERMAN, "de", "identified", [("de-en", 0.3), ("polite", 1.0)]),
        (None, FRENCH, "fr-FR", "identified", [("fr-en", 0.7), ("polite", 1.0)]),
        ("de", FRENCH, "de", "request", [("de-en", 0.3), ("polite", 1.0)]),
    ],
)
def test_the_language_chooses_the_interventions_each_with_its_own_strength(
    steerer: Steerer, named: str | None, prompt: str | None, tag: str, by: str, applied: list[tuple[str, float]]
) -> None:
    fields = PRESET | ({} if named is None else {"source_language": named})
    prepared = steerer.prepare(fields, None if prompt is None else lambda: [prompt])
    assert [(each.artifact, each.strength) for each in prepared.applied] == applied
    told = receipt(steerer, prepared)
    assert (told.source_language, told.source_language_by) == (tag, by)


@pytest.mark.parametrize(
    ("fields", "prompts", "word"),
    [
        ({"source_language": "sw"}, None, "is in 'sw', and any-en@1 is for de, fr-FR"),
        ({"source_language": "fr-CA"}, None, "is in 'fr-CA'"),
        ({}, [ENGLISH], "seems to be in 'en'"),
        ({}, [GERMAN, FRENCH], "prompts are in de, fr"),
        ({}, ["12 + 30 ="], "isn't sure"),
        ({}, [""], "isn't sure"),
        ({}, None, "isn't identified here"),
        ({"source_language": "no such"}, None, "pattern"),
    ],
)
def test_a_language_that_is_not_the_presets_is_a_clear_error(
    steerer: Steerer, fields: dict[str, Any], prompts: list[str] | None, word: str
) -> None:
    with pytest.raises(ApiError) as refused:
        steerer.prepare(PRESET | fields, None if prompts is None else lambda: prompts)
    assert (refused.value.status, refused.value.param) == (422, "steering.source_language")
    assert word in refused.value.message


def test_a_language_that_nothing_depends_on_is_refused_and_none_is_identified(steerer: Steerer) -> None:
    with pytest.raises(ApiError, match="leave it out"):
        prepare(steerer, {"artifact": "polite"}, source_language="de")

    def never() -> list[str]:
        raise AssertionError("the prompt was looked at")

    told = receipt(steerer, steerer.prepare({"interventions": [{"artifact": "polite"}]}, never))
    assert (told.source_language, told.source_language_by) == (None, None)


def test_tags_match_exactly_or_where_one_of_them_has_no_region() -> None:
    assert matching("zh-TW", ["zh-CN", "zh-tw"]) == ["zh-tw"]
    assert matching("zh", ["zh-CN", "zh-TW"]) == ["zh-CN", "zh-TW"]
    assert matching("pt-BR", ["pt-PT", "pt"]) == ["pt"]
    assert matching("pt-BR", ["pt-PT"]) == []


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        ({"prompt": "eins"}, ["eins"]),
        ({"prompt": ["eins", "zwei"]}, ["eins", "zwei"]),
        ({"prompt": [1, 2]}, ["<1 2>"]),
        ({"prompt": [[1], [2, 3]]}, ["<1>", "<2 3>"]),
        ({"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "eins"}]}, ["eins"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "one"},
                    {"role": "assistant", "content": "two"},
                    {"role": "user", "content": [{"type": "text", "text": "drei"}, {"type": "text", "text": "vier"}]},
                ]
            },
            ["drei\nvier"],
        ),
        ({"messages": [{"role": "system", "content": "Be kind."}]}, [""]),
    ],
)
def test_the_language_is_told_by_the_prompt_or_the_last_user_message(
    request_: dict[str, Any], found: list[str]
) -> None:
    assert prompts_of(SimpleNamespace(**request_), lambda ids: f"<{' '.join(map(str, ids))}>") == found
