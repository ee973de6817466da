"""Languages of sentences and short questions."""

from __future__ import annotations

import pytest

from kb.languages import identified, primary


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Wie komme ich von hier zum Bahnhof?", "de"),
        ("Ninawezaje kufika kituoni kutoka hapa?", "sw"),
        ("请问从这里怎么去火车站?", "zh"),
        ("من أين أذهب إلى المحطة؟", "ar"),
        ("Who designed the cathedral?", "en"),
        ("谁设计了这座大教堂？", "zh"),
    ],
)
def test_the_language_of_a_sentence_is_told(text: str, language: str) -> None:
    found = identified(text)
    assert found.language == language and found.probability > 0.5


@pytest.mark.parametrize("text", ["", " ", "1 + 1 = 2", "\ud800", "?!"])
def test_of_a_text_without_one_nothing_is_sure(text: str) -> None:
    assert identified(text).probability < 0.5


def test_a_very_long_text_costs_no_more_than_its_beginning() -> None:
    german = "Wie komme ich von hier zum Bahnhof? " * 200
    assert identified(german) == identified(german + "Comment aller à la gare ? " * 100_000)


def test_a_tag_begins_with_its_language() -> None:
    assert (primary("zh-Hant-TW"), primary("SW")) == ("zh", "sw")
