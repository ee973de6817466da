"""Does a vector from an expert teach a model a language, more than vectors that know nothing of the expert?

The target is SmolLM2, an English model; the language German by default, in NTREX-128 (CC-BY-SA-4.0). Experts are
Gemma-3-270M, which is multilingual and has another width, and SmolLM2 with a LoRA trained on the language
(lora_expert.py). The positive texts are lines 1 to N in the language, the negative ones their English originals;
methods/expertsteer.py does the rest. Controls, each with its own epsilon: `random`, directions as long at the same
layers; `least_squares`, the map from the expert's states to the target's; `self`, the target as its own expert.

Reported is what steering at every token changes of the target's log-probability of sentences in the language, nats a
token. Epsilon is chosen on lines 601 to 624 and reported on later ones, with intervals over sentences; 0 isn't among
the choices, so that a vector that only harms shows. English sentences say what it costs. Writes
results/expertsteer_effect.json and a section of docs/results.md. Captured states, the LoRA, fits and scores are kept in
--work, where an interrupted run goes on.

    POLYHELM_BENCH_DATA=DATA .venv/bin/python benchmarks/expertsteer_effect.py --target polyhelm-data/models/smollm2 \\
        --expert polyhelm-data/models/gemma3-270m --work WORK
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe, environment
from kept import Kept
from results_page import publish
from spread import paired

from methods import expertsteer
from methods.expertsteer import Config, Fit
from server.models import model_identity

EPSILONS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
PAIRS, TEXTS_FOR_INFORMATION = 3, 150
TRAINED, TUNED, MAX_TOKENS = 600, 24, 48
"""The LoRA is trained on lines up to TRAINED, the first of which everything is fitted on."""


def lines(data: Path, language: str) -> list[str]:
    (file,) = (data / "parallel" / "ntrex128").glob(f"newstest2019-*.{language}.txt")
    return file.read_text("utf-8").splitlines()


def captured(model: Path, texts: list[str], file: Path) -> np.ndarray:
    """[texts, layers, width] at the last token, from the file where it is there. In a process of its own: two engines
    don't fit into one.
    """
    if not file.exists():
        process = multiprocessing.get_context("spawn").Process(target=capture, args=(model, texts, file))
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"capturing on {model.name} ended with {process.exitcode}")
    return np.load(file, allow_pickle=False)


def capture(model: Path, texts: list[str], file: Path) -> None:
    from local_model import LocalModel

    partial = file.with_suffix(".partial.npy")
    np.save(partial, LocalModel(model).last_states(texts))
    partial.replace(file)


def lora(options: argparse.Namespace, texts: list[str]) -> tuple[Path, dict[str, Any]]:
    folder = options.work / f"lora.{options.language}.{options.steps}"
    report = folder / "report.json"
    if not report.exists():
        process = multiprocessing.get_context("spawn").Process(
            target=_train, args=(options.target, texts, options.steps, folder, report)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"training the LoRA ended with {process.exitcode}")
    return folder, json.loads(report.read_text("utf-8"))


def _train(model: Path, texts: list[str], steps: int, folder: Path, report: Path) -> None:
    from lora_expert import train

    started = time.monotonic()
    found = train(model, texts, steps, folder)
    report.write_text(json.dumps(found | {"seconds": time.monotonic() - started}), "utf-8")


def plain_fit(make: Callable[[], Fit]) -> dict[str, Any]:
    """A fit as JSON can hold it, and its seconds."""
    started = time.monotonic()
    found = make()
    return {
        "seconds": time.monotonic() - started,
        "vectors": {str(layer): vector.tolist() for layer, vector in sorted(found.vectors.items())},
        "pairs": [pair._asdict() for pair in found.pairs],
        "unexplained": found.unexplained.tolist(),
        "correlations": {str(layer): float(value) for layer, value in found.correlations.items()},
    }


def fitted(
    options: argparse.Namespace, kept: Kept
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[int, np.ndarray]], dict[str, Any]]:
    """The fits, the vectors of all arms by layer, and what the LoRA's training says."""
    count, foreign, english = options.texts, lines(options.data, options.language), lines(options.data, "eng")
    prefix = f"{options.language}.{count}"
    adapted, report = lora(options, foreign[:TRAINED])

    def states(model: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
        both = captured(model, foreign[:count] + english[:count], options.work / f"{prefix}.{name}.npy")
        return both[:count], both[count:]

    gemma, own = states(options.expert, options.expert.name), states(options.target, options.target.name)
    taught = states(adapted, adapted.name)
    config = Config(pairs=PAIRS, mutual_information_texts=TEXTS_FOR_INFORMATION)
    makers = {
        "expert": lambda: expertsteer.fit(*gemma, own[0], config),
        "least_squares": lambda: expertsteer.fit(*gemma, own[0], replace(config, alignment="least_squares")),
        "self": lambda: expertsteer.self_expert(*own, config),
        "lora": lambda: expertsteer.fit(*taught, own[0], config),
    }
    fits = {name: kept.part(f"fit {name}", lambda make=make: plain_fit(make)) for name, make in makers.items()}
    vectors = {
        name: {int(layer): np.array(vector, np.float32) for layer, vector in found["vectors"].items()}
        for name, found in fits.items()
    }
    vectors["random"] = expertsteer.random_vectors(vectors["expert"], 0)
    vectors["lora_random"] = expertsteer.random_vectors(vectors["lora"], 0)
    return fits, vectors, {"lora": report, "fit_seconds": {name: found["seconds"] for name, found in fits.items()}}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    options.work.mkdir(parents=True, exist_ok=True)
    models = [model_identity(str(folder))["weights_digest"] for folder in (options.target, options.expert)]
    names = "language", "texts", "steps", "sentences"
    decisive = {"models": models, **{name: getattr(options, name) for name in names}}
    arms = len(LABELS)
    kept = Kept(options.work, "expertsteer_effect", decisive, 4 + arms * len(EPSILONS) + 1 + 2 * (arms + 1))
    fits, vectors, report = fitted(options, kept)
    from local_model import LocalModel, Request

    from server.engine.edits import Edit

    model = LocalModel(options.target)
    for name, by_layer in vectors.items():
        model.upload(name, {layer: {"vector": vector} for layer, vector in by_layer.items()})
    texts = {
        name: [model.encode(text)[:MAX_TOKENS] for text in lines(options.data, name)[TRAINED:]]
        for name in (options.language, "eng")
    }

    parts = {
        "tune": texts[options.language][:TUNED],
        "test": texts[options.language][TUNED : TUNED + options.sentences],
        "english": texts["eng"][: options.sentences // 2],
    }

    def scores(part: str, arm: str, epsilon: float) -> np.ndarray:
        def measured() -> list[float]:
            edits = () if arm == "none" else (Edit("add", arm, tuple(sorted(vectors[arm])), epsilon),)
            found = model.log_probabilities([Request(each, len(each) - 1, edits) for each in parts[part]])
            return [float(values.mean()) for values in found]

        return np.array(kept.part(f"{part} {arm} {epsilon:g}", measured))

    plain, curve, best = scores("tune", "none", 0.0), {}, {}
    for arm in vectors:
        curve[arm] = {f"{e:g}": float((scores("tune", arm, e) - plain).mean()) for e in EPSILONS}
        best[arm] = max(EPSILONS, key=lambda e, arm=arm: curve[arm][f"{e:g}"])
        print(arm, curve[arm], flush=True)
    found, side = (
        {arm: scores(part, arm, best.get(arm, 0.0)) for arm in ("none", *vectors)} for part in ("test", "english")
    )
    return {
        "target": options.target.name,
        "expert": options.expert.name,
        "language": options.language,
        "texts": options.texts,
        "sentences": {name: len(part) for name, part in parts.items()},
        **{name: {arm: each[name] for arm, each in fits.items()} for name in ("pairs", "unexplained", "correlations")},
        "lengths": {
            arm: {str(layer): float(np.linalg.norm(vector)) for layer, vector in by.items()}
            for arm, by in vectors.items()
        },
        "tuning": curve,
        "epsilon": best,
        "log_probability": {arm: float(values.mean()) for arm, values in found.items()},
        "minus_none": {arm: paired(found[arm], found["none"]) for arm in vectors},
        "english_minus_none": {arm: paired(side[arm], side["none"]) for arm in vectors},
        "expert_minus": {arm: paired(found["expert"], found[arm]) for arm in ("random", "least_squares", "self")},
        "lora_minus": {arm: paired(found["lora"], found[arm]) for arm in ("lora_random", "self")},
        **report,
        "environment": environment(),
    }


LABELS: dict[str, str] = {
    "expert": "Gemma expert",
    "random": "control: random, as long",
    "least_squares": "control: least-squares map",
    "self": "control: self-expert",
    "lora": "LoRA expert",
    "lora_random": "control: random, as long as the LoRA's",
}


def section(results: dict[str, Any]) -> str:
    def nats(each: dict[str, float]) -> str:
        return f"{each['difference']:+.3f} ({each['low']:+.3f} to {each['high']:+.3f})"

    lines_ = [
        f"| {label} | {results['epsilon'][arm]:g} | {nats(results['minus_none'][arm])} "
        f"| {nats(results['english_minus_none'][arm])} |"
        for arm, label in LABELS.items()
    ]

    def word(each: dict[str, float]) -> str:
        return "better than" if each["low"] > 0 else "worse than" if each["high"] < 0 else "not told from"

    def claims(arm: str, against: str) -> str:
        first = f"{word(results['minus_none'][arm])} no steering"
        rest = (
            f"{word(each)} {LABELS[other].removeprefix('control: ')} ({each['difference']:+.3f})"
            for other, each in results[against].items()
        )
        return ", ".join([first, *rest])

    counts, lora_ = results["sentences"], results["lora"]
    pairs = "; ".join(
        f"{LABELS[name]}: "
        + ", ".join(f"{each['expert']} to {each['target']} ({each['mutual_information']:.3f})" for each in found)
        for name, found in results["pairs"].items()
        if name in ("expert", "lora", "self")
    )
    seconds = ", ".join(f"{LABELS[name]} {value:.0f} s" for name, value in results["fit_seconds"].items())
    unexplained = "; ".join(
        f"{LABELS[name]} {np.median(values):.3f} (worst layer {max(values):.3f})"
        for name, values in results["unexplained"].items()
        if name in ("expert", "lora", "self")
    )
    lengths = "; ".join(
        f"{LABELS[arm]} {', '.join(f'{value:.2f}' for value in by.values())}"
        for arm, by in results["lengths"].items()
        if arm in ("expert", "lora", "self")
    )
    return f"""## ExpertSteer: a language from an expert

`benchmarks/expertsteer_effect.py`: target {results["target"]}, experts {results["expert"]} and the target with a LoRA
of rank {lora_["rank"]} trained on the language ({lora_["steps"]} steps, {lora_["tokens"]} tokens, loss
{lora_["loss_first"]:.2f} to {lora_["loss_last"]:.2f}). {results["texts"]} texts in the language
({results["language"]}) and as many in English, {PAIRS} pairs of layers, mutual information over
{TEXTS_FOR_INFORMATION} texts. Change of the target's log-probability, nats a token, on {counts["test"]} sentences in
the language, where it is {results["log_probability"]["none"]:.3f} without steering, and on {counts["english"]} English
ones. Each arm's ε is the best of {", ".join(f"{e:g}" for e in EPSILONS)} on {counts["tune"]} other sentences.

| arm | ε | change in the language (95% interval) | change in English |
|---|---:|---:|---:|
{chr(10).join(lines_)}

The Gemma expert is {claims("expert", "expert_minus")}. The LoRA expert is {claims("lora", "lora_minus")}.

The auto-encoders' error on held-out states, as a share of their variance, median over the layers: {unexplained}. Where
the widths agree an orthogonal start is exact. Lengths of the vectors for ε = 1: {lengths}. Pairs of layers (mutual
information, nats): {pairs}. Fitting took: {seconds}.

Measured {describe(results["environment"])}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=Path, required=True, help="folder of the model to steer")
    parser.add_argument("--expert", type=Path, required=True, help="folder of the expert")
    parser.add_argument("--work", type=Path, required=True, help="folder for captured states and the LoRA")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("POLYHELM_BENCH_DATA", "data")))
    parser.add_argument("--language", default="deu", help="as NTREX-128 calls it")
    parser.add_argument("--texts", type=int, default=500, help="a side, to fit on")
    parser.add_argument("--steps", type=int, default=100, help="of the LoRA's training")
    parser.add_argument("--sentences", type=int, default=80, help="to report on")
    results = measure(parser.parse_args())
    publish("expertsteer_effect", results, section(results))


if __name__ == "__main__":
    main()
