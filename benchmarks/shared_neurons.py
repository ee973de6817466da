"""How many neurons do languages share, layer by layer, how much of what the MLPs write is theirs, and are they needed?

Captures the last token of the same news sentences (NTREX-128, CC-BY-SA-4.0) in ten languages, works the neurons' gates
out (methods/gated_mlp.py), and reports the categories of methods/shared_neurons.py. As a control, languages' sentences
are shuffled against each other: what is shared without a common meaning; and the categories are those by the sign of
what the neurons write. Effective scores are of questions of zsRE (Levy et al. 2017; translated by Wang et al. 2024,
without a licence) and the first token of their answers.

Then the neurons that are in a category for at least --share of the sentences are deactivated at every token, and so are
as many random ones of each layer, and the log-probability of the last tokens of other sentences is compared. So it is
with CLAS, which scales partial-shared neurons up and specific ones down in the last third of the layers, against the
same scaling of neurons drawn at random. Writes results/shared_neurons.json and a section of docs/results.md. An
interrupted run goes on behind the last set of neurons, kept in --work.

    POLYHELM_BENCH_DATA=DATA .venv/bin/python benchmarks/shared_neurons.py --model polyhelm-data/models/gemma3-270m \\
        --work WORK
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mzsre
import numpy as np
from environment import describe, environment
from kept import Kept
from local_model import LocalModel, Request
from results_page import publish
from spread import paired

from methods.gated_mlp import disagreement
from methods.shared_neurons import CATEGORIES, TOP, Category, Report, Tally, clas, control
from server.engine.edits import Edit, Point
from server.model_weights import Mlps
from server.models import model_identity

LANGUAGES = ("eng", "deu", "spa", "fra", "rus", "tha", "tur", "vie", "zho-CN", "swa")
"""The paper's nine, with Swahili for Portuguese."""
ASKED = ("en", "de", "es", "fr", "pt", "ru", "th", "tr", "vi", "zh")
"""The languages of the questions: the paper's ten."""
POINTS: tuple[Point, ...] = ("mlp_act", "resid_post", "resid_pre", "attn_out")
FIRST = 500
"""Sentences from 501 on: the first half is what other methods are fitted on. The last ones are scored."""
DEACTIVATED: tuple[Category, ...] = ("all_shared", "partial_shared", "specific")
SCORED_TOKENS = 8
DISAGREEMENT = 0.1
"""Between what neurons write as it was captured, and as it is worked out of the weights: more than bfloat16 makes."""
BETA = GAMMA = 0.2
"""CLAS as published."""


def sentences(folder: Path, language: str) -> list[str]:
    (file,) = folder.glob(f"newstest2019-*.{language}.txt")
    return file.read_text("utf-8").splitlines()[FIRST:1000]


class Neurons:
    """Of texts, [texts, layers, neurons]: what neurons write, and their gates. `writes` [layers, neurons]: the length
    of what each adds to the residual stream when it is 1.
    """

    def __init__(self, model: LocalModel, mlps: Mlps, texts: list[Any]) -> None:
        seen = model.last_states_at(texts, POINTS)
        self.written = seen["mlp_act"]
        self.gates, self.error = np.empty_like(self.written), 0.0
        self.writes = np.empty(self.written.shape[1:], np.float32)
        for layer in range(model.layers):
            mlp = mlps.layer(layer)
            stream = seen["resid_post"][:, layer - 1] if layer else seen["resid_pre"][:, 0]
            self.gates[:, layer], worked_out = mlp(stream, seen["attn_out"][:, layer])
            self.writes[layer] = mlp.writes
            self.error = max(self.error, disagreement(worked_out, self.written[:, layer]))
        if self.error > DISAGREEMENT:
            raise RuntimeError(f"what is worked out differs by {self.error:.0%} from what the engine has")

    def by_language(self, languages: int) -> tuple[np.ndarray, np.ndarray]:
        """`written` and `gates` [languages, inputs, layers, neurons], for texts in that order."""
        written, gates = (each.reshape(languages, -1, *each.shape[1:]) for each in (self.written, self.gates))
        return written, gates


def effective_scores(model: LocalModel, mlps: Mlps, folder: Path, count: int) -> dict[str, Any]:
    """By category and layer: the scores of questions' answers, and the category's share of all that is above 0."""
    asked = mzsre.training()
    pairs = [asked[language][index] for language in ASKED for index in range(count)]
    found = Neurons(model, mlps, [f"Question: {each.question} Answer:" for each in pairs])
    answers = np.array([model.encode(f" {each.answer}", special=False)[0] for each in pairs])
    rows = mlps.unembedding()[answers]
    effects = np.empty_like(found.written)
    for layer in range(model.layers):
        effects[:, layer] = found.written[:, layer] * (rows @ mlps.columns(layer))
    written, gates = found.by_language(len(ASKED))
    effects = effects.reshape(written.shape)
    tally, share = Tally(found.writes), np.zeros((len(CATEGORIES), model.layers))
    for index in range(count):
        kinds = tally.add(written[:, index], gates[:, index], effects[:, index])
        above = np.maximum(effects[:, index], 0)
        for category in range(len(CATEGORIES)):
            share[category] += ((above * (kinds == category)).sum(2) / above.sum(2)).mean(0) / count
    report = tally.report()
    assert report.effective_scores is not None
    return {
        "questions": count,
        "languages": ASKED,
        "of_what_is_above_0": dict(zip(CATEGORIES, share.tolist(), strict=True)),
        "of_the_neurons": dict(zip(CATEGORIES, report.share.tolist(), strict=True)),
        **{
            name: dict(zip(CATEGORIES, np.nan_to_num(table).tolist(), strict=True))
            for name, table in zip(("mean", "largest", "smallest"), report.effective_scores, strict=True)
        },
    }


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
    model: LocalModel, tally: Tally, texts: dict[str, list[str]], share: float, seeds: int, kept: Kept
) -> dict[str, Any]:
    """By category: how many neurons, and what deactivating them, and random ones, does to the log-probability of the
    sentences' last tokens, in nats a token.
    """
    layers, neurons = tally.layers, tally.neurons
    encoded = {language: [model.encode(text) for text in each] for language, each in texts.items()}

    def scores(edits: tuple[Edit, ...]) -> dict[str, list[float]]:
        """All languages in one batch."""
        requests = [Request(ids, min(SCORED_TOKENS, len(ids) - 1), edits) for each in encoded.values() for ids in each]
        means = [float(values.mean()) for values in model.log_probabilities(requests)]
        ends = np.cumsum([len(each) for each in encoded.values()])[:-1]
        return {name: part.tolist() for name, part in zip(encoded, np.split(np.array(means), ends), strict=True)}

    def scaled(key: str, weights: np.ndarray, strength: float) -> dict[str, np.ndarray]:
        # A layer without weights is left alone, and not counted as one that nothing touched.
        used = {layer: {"mask": each} for layer, each in enumerate(weights) if each.any()}

        def measured() -> dict[str, list[float]]:
            model.upload(key, used, "mlp_act")
            return scores((Edit("scale", key, tuple(used), strength, point="mlp_act"),))

        return {language: np.array(each) for language, each in kept.part(key, measured).items()}

    def deactivated(key: str, members: list[np.ndarray]) -> dict[str, np.ndarray]:
        masks = np.zeros((layers, neurons), np.float32)
        for layer, chosen in enumerate(members):
            masks[layer, chosen] = 1
        return scaled(key, masks, -1.0)

    plain = {language: np.array(each) for language, each in kept.part("none", lambda: scores(())).items()}
    found = {}
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
    mlps = Mlps(str(options.model))
    names = "inputs", "share", "scored", "seeds"
    decisive = {
        "model": model_identity(str(options.model))["weights_digest"],
        "languages": LANGUAGES,
        **{name: getattr(options, name) for name in names},
    }
    kept = Kept(options.work, "shared_neurons", decisive, 1 + (len(DEACTIVATED) + 1) * (1 + options.seeds))
    model = LocalModel(options.model, POINTS)
    texts = {language: sentences(folder, language) for language in LANGUAGES}
    started = time.monotonic()
    found = Neurons(model, mlps, [text for language in LANGUAGES for text in texts[language][:count]])
    written, gates = found.by_language(len(LANGUAGES))
    seconds = time.monotonic() - started
    print(f"captured {len(found.written)} texts in {seconds:.0f} s, gates off by {found.error:.1%}", flush=True)
    tallies = {name: Tally(found.writes) for name in ("parallel", "shuffled", "by_what_is_written")}
    rows = range(len(LANGUAGES))
    for index in range(count):
        others = [(index + 7 * language) % count for language in rows]
        tallies["parallel"].add(written[:, index], gates[:, index])
        tallies["shuffled"].add(written[rows, others], gates[rows, others])
        tallies["by_what_is_written"].add(written[:, index])
    effective = effective_scores(model, mlps, options.data, min(count, 60))
    held_out = {language: each[-options.scored :] for language, each in texts.items()}
    off = deactivation(model, tallies["parallel"], held_out, options.share, options.seeds, kept)
    return {
        "model": options.model.name,
        "data": {"name": "NTREX-128", "first": FIRST + 1, "inputs": count, "languages": LANGUAGES},
        "layers": model.layers,
        "neurons": written.shape[3],
        "capture_seconds": seconds,
        "gates_error": found.error,
        **{name: described(tally.report()) for name, tally in tallies.items()},
        "effective": effective,
        "deactivation": {"share": options.share, "sentences": options.scored, "seeds": options.seeds}
        | {"categories": off},
        "environment": environment(),
    }


def section(results: dict[str, Any]) -> str:
    parallel, shuffled, off = results["parallel"], results["shuffled"], results["deactivation"]
    effective, by_written = results["effective"], results["by_what_is_written"]
    columns = (
        parallel["share"]["all_shared"],
        shuffled["share"]["all_shared"],
        by_written["share"]["all_shared"],
        parallel["contribution"]["all_shared"],
        shuffled["contribution"]["all_shared"],
        parallel["top_share"]["all_shared"],
        parallel["share"]["partial_shared"],
        parallel["share"]["specific"],
        parallel["share"]["non_activated"],
        effective["of_the_neurons"]["all_shared"],
        effective["of_what_is_above_0"]["all_shared"],
    )
    names = "all-shared", "shuffled", "by written", "contribution", "shuffled", f"{TOP} largest"
    names += "partial", "specific", "none", "asked", "answer"
    by_layer = [
        f"| {layer} | {' | '.join(f'{each[layer]:.1%}' for each in columns)} |" for layer in range(results["layers"])
    ]
    by_layer.append(f"| mean | {' | '.join(f'{np.mean(each):.1%}' for each in columns)} |")

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
{results["neurons"]} neurons a layer. A neuron is active where its gate is above 0; the gates are worked out of the
weights, and what comes of them differs by at most {results["gates_error"]:.1%} from what the engine has. Shuffled:
other sentences in each language, so that what is left is shared whatever the meaning. What speaks for the answer: the
effective scores above 0 of {effective["questions"]} questions of zsRE in {len(effective["languages"])} languages
({", ".join(effective["languages"])}), for the first token of the answer.

Columns: share of all-shared neurons, the same with shuffled sentences, and by the sign of what is written; all-shared
of the contribution, the same shuffled, and of the {TOP} largest contributions; share of partial-shared, specific and
non-activated neurons; in the questions, share of all-shared neurons, and of what speaks for the answer.

| layer | {" | ".join(names)} |
|---|{"---:|" * len(columns)}
{chr(10).join(by_layer)}

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
    parser.add_argument("--work", type=Path, required=True, help="a folder to keep what was measured in")
    results = measure(parser.parse_args())
    publish("shared_neurons", results, section(results))


if __name__ == "__main__":
    main()
