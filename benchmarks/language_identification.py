"""How often does a preset that acts by language tell the language of a prompt, and how often the wrong one?

kb/languages.py identifies news sentences of NTREX-128, and their first five words, as the server does it: below a
probability of 0.5 it refuses. Writes results/language_identification.json.

    POLYHELM_BENCH_DATA=DATA .venv/bin/python benchmarks/language_identification.py
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from environment import environment

from kb.languages import identified
from server.api.source_language import LEAST_PROBABILITY

RESULTS = Path(__file__).parent / "results" / "language_identification.json"
LANGUAGES = {
    "deu": "de", "spa": "es", "fra": "fr", "rus": "ru", "arb": "ar", "zho-CN": "zh", "swa": "sw", "tam": "ta",
    "tur": "tr", "vie": "vi", "tha": "th", "hin": "hi", "ind": "id",
}  # fmt: skip
SENTENCES, WORDS = 300, 5


def measure(texts: list[str], language: str) -> dict[str, float]:
    found = [identified(text) for text in texts]
    sure = [each for each in found if each.probability >= LEAST_PROBABILITY]
    return {
        "right": sum(each.language == language for each in sure) / len(texts),
        "wrong": sum(each.language != language for each in sure) / len(texts),
        "refused": 1 - len(sure) / len(texts),
    }


def main() -> int:
    data = Path(os.environ.get("POLYHELM_BENCH_DATA", "data")) / "parallel" / "ntrex128"
    rows, started, count = {}, time.perf_counter(), 0
    for name, language in LANGUAGES.items():
        (file,) = data.glob(f"newstest2019-ref.{name}.txt")
        sentences = file.read_text("utf-8").splitlines()[:SENTENCES]
        # Without spaces between words, five words are about ten characters.
        starts = [" ".join(each.split()[:WORDS]) if " " in each else each[: 2 * WORDS] for each in sentences]
        rows[language] = {"sentences": measure(sentences, language), "five_words": measure(starts, language)}
        count += 2 * len(sentences)
        print(language, rows[language], flush=True)
    means = {
        part: {key: sum(row[part][key] for row in rows.values()) / len(rows) for key in ("right", "wrong", "refused")}
        for part in ("sentences", "five_words")
    }
    results = {
        "environment": environment(),
        "least_probability": LEAST_PROBABILITY,
        "sentences": SENTENCES,
        "milliseconds": 1000 * (time.perf_counter() - started) / count,
        "mean": means,
        "languages": rows,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(means)
    return 0


if __name__ == "__main__":
    sys.exit(main())
