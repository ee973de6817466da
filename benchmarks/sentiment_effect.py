"""Does the demo's sentiment vector move sentiment, and where does the text break?

Continues 120 openings of film reviews that the vector was not fitted on, at every strength, and scores the
continuations alone: sentiment with VADER (Hutto and Gilbert 2014), repetition with distinct-2, likelihood with the
unsteered model's perplexity. Writes results/sentiment_effect.json, docs/sentiment.md and docs/sentiment.png; exits with
1 unless the mean sentiment rises strictly along the claimed strengths.

    make serve                                                            # in another terminal
    make bench-setup && .venv/bin/python benchmarks/sentiment_effect.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

import matplotlib.pyplot as plt
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
    monotone,
    openings,
    parser,
    save,
    summarise,
)
from matplotlib.ticker import ScalarFormatter
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

STRENGTHS = (-6.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0)
CLAIM = (-2.0, -1.0, 0.0, 1.0, 2.0)
RESULTS = BENCHMARKS / "results" / "sentiment_effect.json"
PAGE = DOCS / "sentiment.md"
PLOT = DOCS / "sentiment.png"
EXAMPLES = 2


def held_out() -> list[str]:
    """The openings. RuntimeError if one of them occurs in the texts that the vector was fitted on."""
    prompts = openings()
    demo = resources.files("server").joinpath("demo_data", "sentiment.jsonl").read_text("utf-8")
    fitted = [_plain(text) for line in demo.splitlines() for text in json.loads(line).values()]
    if seen := [prompt for prompt in prompts if any(_plain(prompt) in text for text in fitted)]:
        raise RuntimeError(f"not held out, the demo sample contains: {seen}")
    return prompts


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def plot(results: dict[str, Any]) -> None:
    rows, claim, prompts = results["rows"], results["claim"], results["prompts"]
    strengths = [row["strength"] for row in rows]
    means = [row["mean_score"] for row in rows]
    low, high = zip(*(row["interval_95"] for row in rows), strict=True)
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    for axes in (left, right):
        axes.axvspan(min(claim), max(claim), color="0.93", zorder=0)
        axes.set_xlabel("strength of the sentiment vector")
        axes.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
    left.axhline(0, color="0.6", linewidth=1)
    left.fill_between(strengths, low, high, color="tab:blue", alpha=0.25, linewidth=0, label="95% interval")
    left.plot(strengths, means, "o-", color="tab:blue", label=f"mean of {prompts} continuations")
    left.set_ylabel("VADER compound score")
    left.set_ylim(-1, 1)
    left.set_title("Sentiment of the continuation")
    left.spines["right"].set_visible(False)
    left.legend(frameon=False, loc="lower right")
    perplexity = [row["median_perplexity"] for row in rows]
    (line,) = right.plot(
        strengths, perplexity, "s-", color="tab:red", label="perplexity under the unsteered model (left axis)"
    )
    right.set_yscale("log")
    right.yaxis.set_major_formatter(ScalarFormatter())
    right.set_ylabel("median perplexity, log scale", color="tab:red")
    second = right.twinx()
    distinct = [row["distinct_2"] for row in rows]
    (other,) = second.plot(strengths, distinct, "^--", color="tab:green", label="distinct-2 (right axis)")
    second.set_ylim(0, 1.05)
    second.set_ylabel("distinct-2", color="tab:green")
    right.set_title("Where the text breaks")
    right.legend(handles=[line, other], frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=11)
    figure.savefig(PLOT, dpi=110)
    plt.close(figure)


def page(results: dict[str, Any]) -> str:
    """docs/sentiment.md."""
    rows, claim, artifact = results["rows"], results["claim"], results["artifact"]
    by_strength = {row["strength"]: row for row in rows}
    ends = by_strength[min(claim)], by_strength[max(claim)]
    extremes = rows[0], rows[-1]
    plain = by_strength[0.0]["median_perplexity"]

    def times(pair: Sequence[dict[str, Any]]) -> str:
        return " and ".join(f"{row['median_perplexity'] / plain:.1f}" for row in pair)

    layers = artifact["default_layers"]
    pairs = artifact["provenance"]["data"]["rows"]
    table = [
        f"| {'**' if row['strength'] in claim else ''}{row['strength']:+g}{'**' if row['strength'] in claim else ''} "
        f"| {row['relative_dose']:.2f} | {row['mean_score']:+.2f} "
        f"({row['interval_95'][0]:+.2f} to {row['interval_95'][1]:+.2f}) "
        f"| {row['share_positive']:.0%} / {row['share_negative']:.0%} "
        f"| {row['distinct_2']:.2f} | {row['median_perplexity']:.1f} |"
        for row in rows
    ]
    verdict = "rises with every step" if results["monotone"] else "does NOT rise with every step"
    return f"""# What the sentiment vector does

Made by `benchmarks/sentiment_effect.py`; don't edit. Every number is in `benchmarks/results/sentiment_effect.json`.

The demo artifact `sentiment` was fitted on {pairs} pairs of film reviews and their counterfactual revisions. Here it
steers {results["prompts"]} openings of other reviews, which VADER scores as neutral: up to {results["tokens"]} tokens
each, temperature {results["temperature"]:g}, one fixed seed per opening, every token of prompt and generation edited at
layers {layers[0]} to {layers[-1]}. The continuation alone is scored.

![Sentiment, perplexity and distinct-2 against strength](sentiment.png)

| strength | relative dose | VADER, mean (95% interval) | positive / negative | distinct-2 | perplexity |
|---:|---:|---:|---:|---:|---:|
{chr(10).join(table)}

Over the strengths in bold (shaded in the plot) the mean sentiment **{verdict}**, from {ends[0]["mean_score"]:+.2f} to
{ends[1]["mean_score"]:+.2f}; the median perplexity at the two ends is {times(ends)} times that of unsteered text.
Further out the text breaks: at {extremes[0]["strength"]:+g} and {extremes[1]["strength"]:+g} perplexity is
{times(extremes)} times that of unsteered text, and distinct-2 is {extremes[0]["distinct_2"]:.2f} and
{extremes[1]["distinct_2"]:.2f}. Perplexity shows words that make no sense, distinct-2 words that repeat; both kinds of
broken text score near 0, for they hold few words that VADER knows.

- **VADER** is a lexicon with rules; it has seen neither the model nor the vector. Its compound score is in [-1, 1].
- **distinct-2** is the share of distinct pairs of neighbouring words in a continuation: low when text repeats itself.
- **perplexity** is the median, over continuations, of the perplexity given the opening under the *unsteered* model.
- **relative dose** is the largest length of the added vector relative to the activation, over the layers; the receipt
  says it.
- Intervals are bootstrapped over openings. Strength 0 is sent without `steering`. Every receipt was checked: tokens
  touched (or already edited in the prefix cache) are all tokens that the model read.

## What it reads like

{examples_table(results["examples"])}
## Run it again

<!-- not run: it measures for an hour -->
```bash
make serve                                                            # in one terminal
make bench-setup && .venv/bin/python benchmarks/sentiment_effect.py   # in another
```

It exits with 1 unless the mean rises along the strengths in bold. Seeds are fixed, but bfloat16 sums depend on which
requests share a batch, so the last digits move from run to run.

{measured(results)}"""


def measure(options: argparse.Namespace) -> dict[str, Any]:
    claim = sorted(options.claim)
    strengths = sorted({0.0, *options.strengths, *claim})
    prompts = held_out()
    analyser = SentimentIntensityAnalyzer()
    found = Sampler(options.url, options.artifact, options.tokens, options.in_flight).run(prompts, strengths)

    def score(text: str) -> float:
        return float(analyser.polarity_scores(text)["compound"])

    rows = summarise(found, score)
    for row in rows:
        scores = [score(continuation.text) for continuation in found[row["strength"]]]
        row["share_positive"] = statistics.fmean(value > 0 for value in scores)
        row["share_negative"] = statistics.fmean(value < 0 for value in scores)
    return conditions(options.url, options.artifact) | {
        "prompts": len(prompts),
        "tokens": options.tokens,
        "temperature": TEMPERATURE,
        "claim": claim,
        "monotone": monotone(rows, claim),
        "rows": rows,
        "examples": examples(prompts, found, claim, EXAMPLES),
    }


def main() -> int:
    arguments = parser((__doc__ or "").partition("\n")[0], "sentiment", STRENGTHS)
    arguments.add_argument(
        "--claim", type=float, nargs="+", default=list(CLAIM), help="the mean must rise along these strengths"
    )
    options = arguments.parse_args()
    results = load(RESULTS) if options.redraw else measure(options)
    save(RESULTS, results)
    plot(results)
    PAGE.write_text(page(results), "utf-8")
    print("monotone" if results["monotone"] else "NOT monotone", "along", results["claim"])
    return 0 if results["monotone"] else 1


if __name__ == "__main__":
    sys.exit(main())
