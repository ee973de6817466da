"""Does the demo's French vector make the model write French, and how well?

Continues the same 120 English openings as sentiment_effect.py, at every strength, and asks py3langid, over all its 97
languages, which language each continuation is in. Writes results/french_effect.json and docs/french.md; exits with 1
unless at least nine in ten continuations are French at the artifact's default strength, and at most one in ten without
steering.

    make serve                                                         # in another terminal
    make bench-setup && .venv/bin/python benchmarks/french_effect.py
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import py3langid
from effect import (
    BENCHMARKS,
    DOCS,
    TEMPERATURE,
    Sampler,
    conditions,
    examples,
    examples_table,
    load,
    measured,
    openings,
    parser,
    save,
    summarise,
)

STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
RESULTS = BENCHMARKS / "results" / "french_effect.json"
PAGE = DOCS / "french.md"
EXAMPLES = 3


def is_french(text: str) -> float:
    return float(py3langid.classify(text)[0] == "fr")


def page(results: dict[str, Any]) -> str:
    """docs/french.md."""
    artifact, default = results["artifact"], results["artifact"]["default_strength"]
    layers, data = artifact["default_layers"], artifact["provenance"]["data"]
    table = [
        f"| {'**' if row['strength'] == default else ''}{row['strength']:g}"
        f"{'**' if row['strength'] == default else ''} | {row['relative_dose']:.2f} | {row['mean_score']:.0%} "
        f"({row['interval_95'][0]:.0%} to {row['interval_95'][1]:.0%}) "
        f"| {row['distinct_2']:.2f} | {row['median_perplexity']:.1f} |"
        for row in results["rows"]
    ]
    return f"""# What the French vector does

Made by `benchmarks/french_effect.py`; don't edit. Every number is in `benchmarks/results/french_effect.json`.

The demo artifact `french` was fitted on {data["rows"]} paragraphs of the Universal Declaration of Human Rights in
French and English. Here it steers {results["prompts"]} English openings of film reviews: up to
{results["tokens"]} tokens each, temperature {results["temperature"]:g}, one fixed seed per opening, every token of
prompt and generation edited at layers {layers[0]} to {layers[-1]}. py3langid, choosing among all its languages, names
the language of the continuation alone.

| strength | relative dose | French (95% interval) | distinct-2 | perplexity |
|---:|---:|---:|---:|---:|
{chr(10).join(table)}

In bold: the artifact's default strength. Columns are explained in [sentiment.md](sentiment.md). The perplexity is
that of French after an English opening, so it is high for good French, too.

**What this vector can't do:** SmolLM2 was trained on English. Steering moves it to the French that it has: articles,
spelling and many words are French, many others are invented, and the text says little. A multilingual model has more
to be steered to; the demo is fitted anew on whatever model is served.

## What it reads like

{examples_table(results["examples"])}
## Run it again

<!-- not run: it measures for an hour -->
```bash
make serve                                                         # in one terminal
make bench-setup && .venv/bin/python benchmarks/french_effect.py   # in another
```

{measured(results)}"""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    found_on = conditions(options.url, options.artifact)
    default = found_on["artifact"]["default_strength"]
    strengths = sorted({0.0, default, *options.strengths})
    prompts = openings()
    found = Sampler(options.url, options.artifact, options.tokens, options.in_flight).run(prompts, strengths)
    shown = [strength for strength in strengths if strength <= default]
    return found_on | {
        "prompts": len(prompts),
        "tokens": options.tokens,
        "temperature": TEMPERATURE,
        "rows": summarise(found, is_french),
        "examples": examples(prompts, found, shown, EXAMPLES),
    }


def main() -> int:
    options = parser((__doc__ or "").partition("\n")[0], "french", STRENGTHS).parse_args()
    results = load(RESULTS) if options.redraw else measure(options)
    save(RESULTS, results)
    PAGE.write_text(page(results), "utf-8")
    default = results["artifact"]["default_strength"]
    share = {row["strength"]: row["mean_score"] for row in results["rows"]}
    print(f"French: {share[0.0]:.0%} without steering, {share[default]:.0%} at strength {default:g}")
    return 0 if share[0.0] <= 0.1 and share[default] >= 0.9 else 1


if __name__ == "__main__":
    sys.exit(main())
