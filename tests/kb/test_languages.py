"""Languages of short questions."""

from __future__ import annotations

import pytest

from kb.languages import detect


@pytest.mark.parametrize(
    ("text", "language"),
    [("Who designed the cathedral?", "en"), ("Wer entwarf die Kathedrale?", "de"), ("谁设计了这座大教堂？", "zh")],
)
def test_a_question_is_recognised(text: str, language: str) -> None:
    assert detect(text) == language
    assert detect(text, {language, "sw"}) == language
    assert detect(text, {"xx"}) == "xx"
