"""Which language a text is in: py3langid (Lui and Baldwin 2012, "langid.py"), over its 97 languages."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

LONGEST = 4000
"""Characters that are looked at."""

PARENTS = {"wuu": "zh"}
"""Told apart by py3langid, and hardly so in writing: one in twenty sentences of Mandarin news passes for Wu."""


class Identified(NamedTuple):
    """An ISO 639-1 tag, and how sure it is, from 0 to 1."""

    language: str
    probability: float


def identified(text: str) -> Identified:
    """The most probable language of a text. Any text has one, also an empty one: look at the probability."""
    language, probability = _identifier().classify(text[:LONGEST])
    return Identified(PARENTS.get(language, language), float(probability))


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def primary(tag: str) -> str:
    """`zh` of `zh-CN`."""
    return tag.partition("-")[0].lower()
