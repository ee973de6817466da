"""Which language a text is in."""

from __future__ import annotations

from collections.abc import Collection

import py3langid


def detect(text: str, among: Collection[str] = ()) -> str:
    """The ISO 639-1 code of the likeliest language, of all 97 or `among` those given (of which none may be known)."""
    if not among:
        return str(py3langid.classify(text)[0])
    ranked = (str(language) for language, _ in py3langid.rank(text))
    return next((language for language in ranked if language in among), min(among))
