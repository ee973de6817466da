"""MzsRE (Wang et al. 2024), made-up facts in 12 languages, read from $POLYHELM_BENCH_DATA/editing/mzsre.

Its repository states no licence, so that nothing of it is in this one. `mzsre_12lang_head400.jsonl` has the first 400
items; the first 200 are for choosing, the others for measuring. `zsre_mend_train_*_head2000.tsv` are training questions
about other subjects.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

ISO: Final = {"cz": "cs", "du": "nl"}
"""The data's codes that aren't ISO 639-1."""
CODES: Final = ("en", "cz", "de", "du", "es", "fr", "pt", "ru", "th", "tr", "vi", "zh")
LANGUAGES: Final = tuple(ISO.get(code, code) for code in CODES)
PREFIX: Final = "nq question: "
DEV: Final = 200

Kind = Literal["src", "rephrase", "loc", "portability"]


class QA(NamedTuple):
    question: str
    answer: str


class Item(NamedTuple):
    """A fact that is to be learned, and questions about it and beside it, by kind, in one language."""

    src: QA
    rephrase: QA
    loc: QA
    portability: QA


def data() -> Path:
    if "POLYHELM_BENCH_DATA" not in os.environ:
        raise SystemExit("set POLYHELM_BENCH_DATA to the folder that has editing/mzsre and tasks/xquad in it")
    return Path(os.environ["POLYHELM_BENCH_DATA"])


def folder() -> Path:
    return data() / "editing" / "mzsre"


def items() -> list[dict[str, Item]]:
    """By language, for each of the 400."""
    lines = (folder() / "mzsre_12lang_head400.jsonl").read_text("utf-8").splitlines()
    return [{ISO.get(code, code): _item(row[code]) for code in CODES} for row in map(json.loads, lines)]


def _item(row: dict[str, Any]) -> Item:
    other = row["portability"]
    return Item(
        QA(row["src"], row["alt"]),
        QA(row["rephrase"], row["alt"]),
        QA(row["loc"].removeprefix(PREFIX), row["loc_ans"]),
        QA(other["New Question"], other["New Answer"]),
    )


def training() -> dict[str, list[QA]]:
    """By language, line-aligned. Rows that any language lacks an answer for are left out of all."""
    rows = {}
    for code in CODES:
        lines = (folder() / f"zsre_mend_train_{code}_head2000.tsv").read_text("utf-8").split("\n")
        rows[ISO.get(code, code)] = [tuple(part.strip() for part in line.split("\t")) for line in lines if line]
    whole = [
        number
        for number in range(len(rows["en"]))
        if all(len(rows[language][number]) == 2 and all(rows[language][number]) for language in LANGUAGES)
    ]
    return {language: [QA(*rows[language][number]) for number in whole] for language in LANGUAGES}
