"""How many neurons do languages share, layer by layer, how much of what the MLPs write is theirs, and are they needed?

Captures `mlp_act` at the last token of the same news sentences (NTREX-128, CC-BY-SA-4.0) in ten languages, and reports
the categories of methods/shared_neurons.py with the lengths of the down projections' columns. As a control, languages'
sentences are shuffled against each other: what is shared without a common meaning.

Then the neurons that are in a category for at least --share of the sentences are deactivated at every token, and so are
as many random ones of each layer, and the log-probability of the last tokens of other sentences is compared. So it is
with CLAS, which scales partial-shared neurons up and specific ones down in the last third of the layers, against the
same scaling of neurons drawn at random. Writes results/shared_neurons.json and a section of docs/results.md.

    POLYHELM_BENCH_DATA=DATA .venv/bin/python benchmarks/shared_neurons.py --model polyhelm-data/models/gemma3-270m
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe, environment
from local_model import LocalModel, Request
from results_page import publish
from safetensors import safe_open
from spread import paired

from methods.shared_neurons import CATEGORIES, Category, Report, Tally, clas, control
from server.engine.edits import Edit

LANGUAGES = ("eng", "deu", "spa", "fra", "rus", "tha", "tur", "vie", "zho-CN", "swa")
"""The paper's nine, with Swahili for Portuguese."""
FIRST = 500
"""Sentences from 501 on: the first half is what other methods are fitted on. The last ones are scored."""
DEACTIVATED: tuple[Category, ...] = ("all_shared", "partial_shared", "specific")
SCORED_TOKENS = 8
BETA = GAMMA = 0.2
"""CLAS as published."""


def sentences(folder: Path, language: str) -> list[str]:
    (file,) = folder.glob(f"newstest2019-*.{language}.txt")
    return file.read_text("utf-8").splitlines()[FIRST:1000]


def column_norms(model: Path) -> np.ndarray:
    """[layers, neurons]: of the down projections' columns. RuntimeError for a model that names them otherwise."""
    found: dict[int, np.ndarray] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.endswith(".mlp.down_proj.weight"):
                    layer = int(name.split(".layers.")[1].split(".")[0])
                    found[layer] = tensors.get_tensor(name).float().norm(dim=0).numpy()
    if not found:
        raise RuntimeError(f"{model.name}: no tensor is named ...mlp.down_proj.weight")
    return np.stack([found[layer] for layer in range(len(found))])


def described(report: Report) -> dict[str, Any]:
    """By category where there is one, then by layer."""
    fields = {key: value for key, value in asdict(report).items() if isinstance(value, np.ndarray)}
    shaped = {
        key: dict(zip(CATEGORIES, np.round(fields[key], 4).tolist(), strict=True))
        for key in ("share", "top_share", "contribution", "repeating")
    }
    active = dict(zip(LANGUAGES, np.round(report.active, 4).tolist(), strict=True))
    means = {key: {name: float(np.mean(each)) for name, each in value.items()} for key, value in shaped.items()}
    return {"mean_over_layers": means, **shaped, "active": active}


def deactivation(
    model: LocalModel, tally: Tally, texts: dict[str, list[str]], share: float, seeds: int
) -> dict[str, Any]:
    """By category: how many neurons, and what deactivating them, and random ones, does to the log-probability of the
    sentences' last tokens, in nats a token.
    """
    layers, neurons = tally.layers, tally.neurons
    encoded = {language: [model.encode(text) for text in each] for language, each in texts.items()}

    def scores(key: str | None, strength: float = -1.0) -> dict[str, np.ndarray]:
        edits = () if key is None else (Edit("scale", key, tuple(range(layers)), strength, point="mlp_act"),)
        found = {}
        for language, each in encoded.items():
            requests = [Request(ids, min(SCORED_TOKENS, len(ids) - 1), edits) for ids in each]
            found[language] = np.array([values.mean() for values in model.log_probabilities(requests)])
        print(f"scored: {key}", flush=True)
        return found

    def scaled(key: str, weights: np.ndarray, strength: float) -> dict[str, np.ndarray]:
        model.upload(key, {layer: {"mask": each} for layer, each in enumerate(weights)}, "mlp_act")
        return scores(key, strength)

    def deactivated(key: str, members: list[np.ndarray]) -> dict[str, np.ndarray]:
        masks = np.zeros((layers, neurons), np.float32)
        for layer, chosen in enumerate(members):
            masks[layer, chosen] = 1
        return scaled(key, masks, -1.0)

    plain, found = scores(None), {}
    for category in DEACTIVATED:
        members = tally.members(category, share)
        if not (count := sum(map(len, members))):
            found[category] = {"neurons": 0}
            continue
        ours = deactivated(category, members)
        drawn = [deactivated(f"{category}.{seed}", control(members, neurons, seed)) for seed in range(seeds)]
        found[category] = {"neurons": count, "share": count / (layers * neurons), **compared(ours, drawn, plain)}
    weights = np.zeros((layers, neurons), np.float32)
    late = range(layers * 2 // 3, layers)
    partial, specific = (tally.members(category, share) for category in ("partial_shared", "specific"))
    # At a share of one half a neuron can be in both.
    specific = [np.setdiff1d(less, more) for less, more in zip(specific, partial, strict=True)]
    chosen = clas(partial, specific, BETA, GAMMA)
    for layer in late:
        weights[layer, chosen[layer][0]] = chosen[layer][1]
    if count := int(np.count_nonzero(weights)):
        rng = np.random.default_rng(0)
        shuffled = [np.stack([rng.permutation(each) for each in weights]) for _ in range(seeds)]
        ours = scaled("clas", weights, 1.0)
        drawn = [scaled(f"clas.{seed}", each, 1.0) for seed, each in enumerate(shuffled)]
        found["clas"] = {"neurons": count, "share": count / (layers * neurons), **compared(ours, drawn, plain)}
    return found


Scores = dict[str, np.ndarray]
"""Of each sentence, by language."""


def compared(ours: Scores, drawn: list[Scores], plain: Scores) -> dict[str, Any]:
    """With what was not steered, and with the mean of the random draws."""
    random = {language: np.mean([each[language] for each in drawn], axis=0) for language in plain}
    pooled = [np.concatenate([each[language] for language in plain]) for each in (ours, random, plain)]
    return {
        "minus_none": paired(pooled[0], pooled[2]),
        "random_minus_none": paired(pooled[1], pooled[2]),
        "minus_random": paired(pooled[0], pooled[1]),
        "by_language": {
            language: {
                "minus_none": float((ours[language] - plain[language]).mean()),
                "minus_random": paired(ours[language], random[language]),
            }
            for language in plain
        },
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    folder, count = options.data / "parallel" / "ntrex128", options.inputs
    norms = column_norms(options.model)
    model = LocalModel(options.model, ("mlp_act",))
    texts = {language: sentences(folder, language) for language in LANGUAGES}
    started = time.monotonic()
    flat = [text for language in LANGUAGES for text in texts[language][:count]]
    x = model.last_states(flat, "mlp_act").reshape(len(LANGUAGES), count, *norms.shape)
    seconds = time.monotonic() - started
    print(f"captured {len(flat)} texts in {seconds:.0f} s", flush=True)
    tallies = {"parallel": Tally(norms), "shuffled": Tally(norms)}
    for index in range(count):
        others = [(index + 7 * language) % count for language in range(len(LANGUAGES))]
        tallies["parallel"].add(x[:, index])
        tallies["shuffled"].add(np.stack([x[language, other] for language, other in enumerate(others)]))
    held_out = {language: each[-options.scored :] for language, each in texts.items()}
    return {
        "model": options.model.name,
        "data": {"name": "NTREX-128", "first": FIRST + 1, "inputs": count, "languages": LANGUAGES},
        "layers": len(norms),
        "neurons": norms.shape[1],
        "capture_seconds": seconds,
        **{name: described(tally.report()) for name, tally in tallies.items()},
        "deactivation": {"share": options.share, "sentences": options.scored, "seeds": options.seeds}
        | {"categories": deactivation(model, tallies["parallel"], held_out, options.share, options.seeds)},
        "environment": environment(),
    }


def section(results: dict[str, Any]) -> str:
    parallel, shuffled, off = results["parallel"], results["shuffled"], results["deactivation"]
    shown = range(0, results["layers"], 3)

    def row(name: str, values: list[float]) -> str:
        return f"| {name} | {' | '.join(f'{values[layer]:.1%}' for layer in shown)} | {np.mean(values):.1%} |"

    rows = [
        row("all-shared, of the neurons", parallel["share"]["all_shared"]),
        row("the same, sentences shuffled", shuffled["share"]["all_shared"]),
        row("all-shared, of the contribution", parallel["contribution"]["all_shared"]),
        row("the same, sentences shuffled", shuffled["contribution"]["all_shared"]),
        row("all-shared, of the 800 largest contributions", parallel["top_share"]["all_shared"]),
        row("partial-shared, of the neurons", parallel["share"]["partial_shared"]),
        row("specific, of the neurons", parallel["share"]["specific"]),
        row("non-activated, of the neurons", parallel["share"]["non_activated"]),
    ]

    def nats(value: dict[str, float]) -> str:
        return f"{value['difference']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"

    table = [
        f"| {name} | {each['neurons']} | "
        + (
            f"{nats(each['minus_none'])} | {nats(each['random_minus_none'])} | {nats(each['minus_random'])} |"
            if each["neurons"]
            else "none to deactivate | | |"
        )
        for name, each in off["categories"].items()
    ]
    scaled = (
        f"`clas` scales instead, at the last third of the layers: partial-shared neurons by {1 + BETA:g}, specific "
        f"ones by {1 - GAMMA:g}, against the same factors for random ones. "
        if "clas" in off["categories"]
        else ""
    )
    verdicts = []
    for name, each in off["categories"].items():
        if each["neurons"]:
            low, high = each["minus_random"]["low"], each["minus_random"]["high"]
            word = "costs more than" if high < 0 else "costs less than" if low > 0 else "can't be told from"
            if name == "clas":
                word = "is worse than" if high < 0 else "is better than" if low > 0 else "can't be told from"
                verdicts.append(f"CLAS {word} the same scaling of random neurons")
            else:
                verdicts.append(f"deactivating {name} neurons {word} deactivating as many random ones")
    return f"""## Shared neurons: how many, and what they carry

`benchmarks/shared_neurons.py`: {results["model"]}, {results["data"]["inputs"]} sentences of NTREX-128 in
{len(results["data"]["languages"])} languages ({", ".join(results["data"]["languages"])}), last token,
{results["neurons"]} neurons a layer. A neuron is active where what it writes is above 0. Shuffled: other sentences in
each language, so that what is left is shared whatever the meaning.

| layer | {" | ".join(map(str, shown))} | mean of all |
|---|{"---:|" * (len(shown) + 1)}
{chr(10).join(rows)}

Deactivated at every token: neurons that are in the category for at least {off["share"]:.0%} of the sentences, or as
many random ones of the same layers (mean of {off["seeds"]} draws). {scaled}Log-probability of the last
{SCORED_TOKENS} tokens of {off["sentences"]} other sentences a language, nats a token, with 95% intervals over
sentences:

| category | neurons | minus not steered | random minus not steered | minus random |
|---|---:|---:|---:|---:|
{chr(10).join(table)}

So {"; ".join(verdicts) or "there was nothing to deactivate"}.

Measured {describe(results["environment"])}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("POLYHELM_BENCH_DATA", "data")))
    parser.add_argument("--inputs", type=int, default=60, help="sentences to find the neurons with")
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the sentences, for which a neuron is in its category"
    )
    parser.add_argument("--scored", type=int, default=12, help="other sentences a language, to score")
    parser.add_argument("--seeds", type=int, default=2, help="draws of random neurons")
    results = measure(parser.parse_args())
    publish("shared_neurons", results, section(results))


if __name__ == "__main__":
    main()
