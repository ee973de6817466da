"""Does LF-Steering make a model answer paraphrases alike, and as right as before?

PARAREL (Elazar et al. 2021, MIT): facts of a relation, each asked by several patterns that end in the object. The
answer is the likeliest of the relation's objects, by the logit of its first token. Consistency is the share of pairs of
paraphrases of a fact with the same answer.

On the first third of each relation's facts the layer is located and the features are chosen (methods/lf_steering.py);
on the second their number and alpha, with which the most pairs are both right, as any constant answer is consistent;
the last is reported, with intervals over facts. `random` has as many features, drawn from those that fire, with the
same gains and a choice of its own; `literal` is the paper's decode-and-replace with delta's choice, `reconstruction`
the same with alpha 0. The SAE is that of benchmarks/lf_steering_sae.py. Writes results/lf_steering_effect.json and a
section of docs/results.md. An interrupted run goes on behind the last setting, kept in --work.

    POLYHELM_BENCH_DATA=DATA .venv/bin/python benchmarks/lf_steering_effect.py --model polyhelm-data/models/smollm2 \\
        --sae WORK/sae.13.safetensors --layer 13 --work WORK
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import random
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from environment import describe, environment
from kept import Kept
from local_model import LocalModel
from results_page import publish
from safetensors.numpy import load_file
from spread import paired

from methods import lf_steering
from methods.sae import Sae
from server.engine.edits import Edit, Function
from server.engine.spans import Span
from server.models import model_identity

RELATIONS = ("P36", "P407", "P495", "P159", "P17", "P364")
"""Capital, language of work, country of origin, headquarters, country, original language."""
LAYER = 13
"""Of the SAE, unless --layer says another: the one that the paraphrase classifier chose in SmolLM2."""
COUNTS, ALPHAS = (16, 64), (0.25, 0.5, 1.0, 2.0, 8.0, 30.0)
MAX_PATTERNS, PAIRS, SEED = 5, 300, 0
BUT_THE_FIRST = Span(exclude_prompt_positions=(0,))
"""The first token is an attention sink, on which a calibrated SAE is no use."""


class Fact(NamedTuple):
    relation: str
    prompts: list[list[int]]
    right: int
    """Of the relation's candidates."""


class Answers(NamedTuple):
    """By fact: the share of its pairs that agree, of its paraphrases that are right, and of its pairs that are both."""

    consistent: np.ndarray
    right: np.ndarray
    both_right: np.ndarray


def facts(model: LocalModel, folder: Path, per_relation: int) -> tuple[list[Fact], dict[str, list[int]]]:
    """Shuffled, and each relation's candidates: first tokens that begin one object only."""
    patterns, rows = defaultdict(list), defaultdict(list)
    for line in (folder / "patterns.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        before, found, after = row["pattern"].partition("[Y]")
        if found and not after.strip(" .") and "[X]" in before:
            patterns[row["relation"]].append(before.rstrip())
    for line in (folder / "trex_facts.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        rows[row["relation"]].append(row)
    made, candidates = [], {}
    for relation in RELATIONS:
        first = {row["obj_label"]: model.encode(f" {row['obj_label']}", special=False)[0] for row in rows[relation]}
        once = {token for token, count in Counter(first.values()).items() if count == 1}
        candidates[relation] = sorted(once)
        kept = [row for row in rows[relation] if first[row["obj_label"]] in once]
        random.Random(SEED).shuffle(kept)
        for row in kept[:per_relation]:
            texts = [each.replace("[X]", row["sub_label"]) for each in patterns[relation][:MAX_PATTERNS]]
            right = candidates[relation].index(first[row["obj_label"]])
            made.append(Fact(relation, [model.encode(text) for text in texts], right))
    return made, candidates


def chosen(
    model: LocalModel, asked: list[Fact], candidates: dict[str, list[int]], edits: tuple[Edit, ...]
) -> list[Any]:
    """The candidate that each prompt is answered with [facts][prompts]."""
    found: list[Any] = []
    for relation in RELATIONS:
        those = [fact for fact in asked if fact.relation == relation]
        logits = model.next_logits([(ids, edits) for fact in those for ids in fact.prompts], candidates[relation])
        found += np.split(logits.argmax(1), np.cumsum([len(fact.prompts) for fact in those])[:-1]) if those else []
    return found


def scored(asked: list[Fact], given: list[Any]) -> Answers:
    consistent, right, both = [], [], []
    for fact, answers in zip(asked, given, strict=True):
        pairs = list(itertools.combinations(answers, 2))
        consistent.append(np.mean([a == b for a, b in pairs]))
        right.append(np.mean(answers == fact.right))
        both.append(np.mean([a == b == fact.right for a, b in pairs]))
    return Answers(np.array(consistent), np.array(right), np.array(both))


def contrasts(asked: list[Fact], given: list[Any]) -> list[tuple[list[int], list[int]]]:
    """Of a fact's paraphrases, one that is answered right and one that isn't."""
    found = []
    for fact, answers in zip(asked, given, strict=True):
        right = [ids for ids, answer in zip(fact.prompts, answers, strict=True) if answer == fact.right]
        wrong = [ids for ids, answer in zip(fact.prompts, answers, strict=True) if answer != fact.right]
        found += list(zip(right, wrong, strict=False))
    return found


def paraphrases(asked: list[Fact], given: list[Any]) -> list[tuple[list[int], list[int], bool]]:
    found = [
        (fact.prompts[i], fact.prompts[j], bool(answers[i] == answers[j]))
        for fact, answers in zip(asked, given, strict=True)
        for i, j in itertools.combinations(range(len(fact.prompts)), 2)
    ]
    random.Random(SEED).shuffle(found)
    return found[:PAIRS]


def located(model: LocalModel, pairs: list[tuple[list[int], list[int], bool]], layer: int) -> dict[str, Any]:
    first, second = (model.last_states([pair[side] for pair in pairs]) for side in (0, 1))
    found = lf_steering.locate(first, second, np.array([same for _, _, same in pairs]))
    return {
        "layer": found.layer,
        "accuracy": float(found.accuracies[found.layer]),
        "majority": found.majority,
        "accuracy_at_the_sae": float(found.accuracies[layer]),
    }


def upload(model: LocalModel, key: str, rows: Sae, layer: int) -> None:
    tensors = {"encoder": rows.encoder, "bias": rows.encoder_bias, "decoder": rows.decoder, "threshold": rows.threshold}
    model.upload(key, {layer: tensors})


def edit(key: str, alpha: float, layer: int) -> tuple[Edit, ...]:
    return (Edit("rank", key, (layer,), alpha, BUT_THE_FIRST, function=Function("jumprelu")),)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    started, layer = time.monotonic(), options.layer
    tensors = load_file(options.sae)
    sae = Sae(
        "jumprelu",
        **{name: tensors[name] for name in ("encoder", "encoder_bias", "decoder", "decoder_bias")},
        threshold=tensors["threshold"],
    )
    decisive = {
        "model": model_identity(str(options.model))["weights_digest"],
        "sae": hashlib.sha256(options.sae.read_bytes()).hexdigest(),
        **{name: getattr(options, name) for name in ("layer", "facts")},
    }
    kept = Kept(options.work, "lf_steering_effect", decisive, 1 + 1 + 2 * len(COUNTS) * len(ALPHAS) + 5)
    model = LocalModel(options.model)
    everything, candidates = facts(model, options.data / "paraphrase" / "pararel", options.facts)
    # Every third fact: each part has all relations.
    fit, tune, test = everything[0::3], everything[1::3], everything[2::3]

    def asked(name: str, those: list[Fact], edits: tuple[Edit, ...]) -> list[Any]:
        return [
            np.array(each)
            for each in kept.part(name, lambda: [each.tolist() for each in chosen(model, those, candidates, edits)])
        ]

    answers = asked("fit", fit, ())
    probe = located(model, paraphrases(fit, answers), layer)
    pairs = contrasts(fit, answers)
    right, wrong = (model.last_states([pair[side] for pair in pairs])[:, layer] for side in (0, 1))
    firing = np.flatnonzero((sae.encode(np.concatenate([right, wrong])) != 0).mean(0) > 0.01)
    print(f"{len(pairs)} contrasts, {len(firing)} features fire, {probe}", flush=True)
    chosen_features = {}
    for count in COUNTS:
        features = lf_steering.select(sae, right, wrong, 0.0, count)
        drawn = np.random.default_rng(SEED).choice(firing, len(features.indices), replace=False)
        chosen_features[count] = features
        upload(model, f"delta.{count}", lf_steering.delta_rows(sae, features), layer)
        random_features = lf_steering.Features(drawn, features.gains)
        upload(model, f"random.{count}", lf_steering.delta_rows(sae, random_features), layer)

    def run(name: str, those: list[Fact], edits: tuple[Edit, ...]) -> Answers:
        return scored(those, asked(name, those, edits))

    plain, curve, best = run("tune", tune, ()), [], {}
    for arm in ("delta", "random"):
        for count, alpha in itertools.product(COUNTS, ALPHAS):
            found = run(f"tune {arm} {count} {alpha:g}", tune, edit(f"{arm}.{count}", alpha, layer))
            curve.append({"arm": arm, "count": count, "alpha": alpha, **means(found)})
        best[arm] = max((row for row in curve if row["arm"] == arm), key=lambda row: row["both_right"])
    count, alpha = best["delta"]["count"], best["delta"]["alpha"]
    upload(model, "literal", lf_steering.literal_rows(sae, chosen_features[count], alpha), layer)
    upload(model, "reconstruction", lf_steering.literal_rows(sae, chosen_features[count], 0.0), layer)
    names = {arm: f"{arm} {row['count']} {row['alpha']:g}" for arm, row in best.items()}
    names |= {"none": "none", "literal": f"literal {count} {alpha:g}", "reconstruction": f"reconstruction {count}"}
    arms = {
        "none": (),
        **{arm: edit(f"{arm}.{row['count']}", row["alpha"], layer) for arm, row in best.items()},
        "literal": edit("literal", 1.0, layer),
        "reconstruction": edit("reconstruction", 1.0, layer),
    }
    # What is kept of a test has its setting in its name: another choice is another test.
    reported = {arm: run(f"test {names[arm]}", test, edits) for arm, edits in arms.items()}
    others = [arm for arm in arms if arm != "delta"]
    return {
        "model": options.model.name,
        "site": f"resid_post.{layer}",
        "facts": {"fit": len(fit), "tune": len(tune), "test": len(test), "relations": RELATIONS},
        "paraphrases": float(np.mean([len(fact.prompts) for fact in test])),
        "candidates": {relation: len(each) for relation, each in candidates.items()},
        "contrasts": len(pairs),
        "probe": probe,
        "tuning": {"none": means(plain), "curve": curve, "chosen": best},
        "test": {arm: means(found) for arm, found in reported.items()},
        "delta_minus": {
            arm: {
                name: paired(getattr(reported["delta"], name), getattr(reported[arm], name)) for name in Answers._fields
            }
            for arm in others
        },
        "seconds": time.monotonic() - started,
        "environment": environment(),
    }


def means(found: Answers) -> dict[str, float]:
    return {name: float(getattr(found, name).mean()) for name in Answers._fields}


def section(results: dict[str, Any]) -> str:
    def difference(arm: str, name: str) -> str:
        if arm == "delta":
            return ""
        each = results["delta_minus"][arm][name]
        return f"{each['difference']:+.1%} ({each['low']:+.1%} to {each['high']:+.1%})"

    best, counts, probe = results["tuning"]["chosen"], results["facts"], results["probe"]
    choice = {arm: f"{row['count']} features, α {row['alpha']:g}" for arm, row in best.items()}
    choice["literal"] = choice["delta"]
    lines = [
        f"| {arm} | {choice.get(arm, '')} | {row['consistent']:.1%} | {row['right']:.1%} | {row['both_right']:.1%} "
        f"| {difference(arm, 'consistent')} | {difference(arm, 'right')} |"
        for arm, row in results["test"].items()
    ]
    against = results["delta_minus"]["none"]["consistent"]
    more = "more" if against["low"] > 0 else "less" if against["high"] < 0 else "neither more nor less"
    control = results["delta_minus"]["random"]["consistent"]
    than = "more" if control["low"] > 0 else "less" if control["high"] < 0 else "neither more nor less"
    tried = [row for row in results["tuning"]["curve"] if row["arm"] == "delta"]
    better = sum(row["both_right"] > results["tuning"]["none"]["both_right"] for row in tried)
    return f"""## LF-Steering: paraphrases of a fact

`benchmarks/lf_steering_effect.py`: {results["model"]}, PARAREL, {len(counts["relations"])} relations
({", ".join(counts["relations"])}) with {results["paraphrases"]:.1f} paraphrases a fact; {counts["fit"]} facts to fit
({results["contrasts"]} contrastive pairs), {counts["tune"]} to tune, {counts["test"]} to test. Answers are chosen among
the relation's objects. {results["site"]}, every token but the first, the SAE of `benchmarks/lf_steering_sae.py`.

| arm | chosen | pairs that agree | right | pairs both right | delta minus it: agree (95% interval) | right |
|---|---|---:|---:|---:|---:|---:|
{chr(10).join(lines)}

Steered answers to paraphrases agree {more} often than unsteered ones beyond the interval, and {than} often than with
random features. On the tuning facts more pairs were both right than without steering in {better} of delta's
{len(tried)} settings.

The paraphrase classifier is best at layer {probe["layer"]}: {probe["accuracy"]:.1%} on held-out pairs, where guessing
gets {probe["majority"]:.1%}; at the SAE's layer {probe["accuracy_at_the_sae"]:.1%}.

Measured {describe(results["environment"])}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--sae", type=Path, required=True, help="what benchmarks/lf_steering_sae.py trained")
    parser.add_argument("--work", type=Path, required=True, help="a folder to keep what was measured in")
    parser.add_argument("--layer", type=int, default=LAYER, help="the SAE's")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("POLYHELM_BENCH_DATA", "data")))
    parser.add_argument(
        "--facts", type=int, default=42, help="per relation at most, a third each to fit, tune and test"
    )
    results = measure(parser.parse_args())
    publish("lf_steering_effect", results, section(results))


if __name__ == "__main__":
    main()
