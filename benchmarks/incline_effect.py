"""Do INCLINE's maps make a multilingual model choose better, and better than maps that know nothing?

XCOPA (CC-BY-4.0), validation questions: which of two sentences is the cause, or the effect, of a premise? The likelier
continuation, by the mean log-probability of its tokens. The last token of "premise, because" (or "so") is edited at all
layers as in the paper: with the values of a first pass (mode `frozen`), h + alpha (W h + b). Arms: the fitted map; a
random map whose change is as long on average; the identity; CAA, the mean difference between the English and the
language's states. Maps and vectors are fitted on lines 1 to 500 of NTREX-128 (CC-BY-SA-4.0); alpha is chosen for each
language and arm on the even questions and used once on the odd ones. Writes results/incline_effect.json and a section
of docs/results.md. An interrupted run goes on behind the last arm and alpha, kept in --states.

    POLYHELM_BENCH_DATA=DATA .venv/bin/python benchmarks/incline_effect.py --model polyhelm-data/models/gemma3-270m \\
        --states FOLDER
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from environment import describe, environment
from incline_alignment import FITTED, states
from kept import Kept
from local_model import LocalModel, Request
from results_page import publish
from spread import paired, verdict

from methods import incline
from server.engine.edits import Edit
from server.engine.spans import Span
from server.models import model_identity

LANGUAGES = {"id": "ind", "sw": "swa", "ta": "tam", "th": "tha", "tr": "tur", "vi": "vie", "zh": "zho-CN"}
"""XCOPA's codes, and NTREX's."""
CONNECTORS = {
    "id": (" karena", " maka"),
    "sw": (" kwa sababu", " kwa hiyo"),
    "ta": (" காரணமாக", " எனவே"),
    "th": (" เพราะ", " ดังนั้น"),
    "tr": (" çünkü", " bu yüzden"),
    "vi": (" bởi vì", " vì vậy"),
    "zh": (" 因为", " 所以"),
}
"""Between a premise and its cause, and between a premise and its effect; those of lm-evaluation-harness' XCOPA."""
ARMS = ("incline", "random", "caa")
ALPHAS = (-1.0, -0.5, -0.1, 0.1, 0.3, 0.5, 1.0)


class Question(NamedTuple):
    language: str
    index: int
    prompt: list[int]
    choices: tuple[list[int], list[int]]
    right: int


def questions(model: LocalModel, file: Path, language: str) -> list[Question]:
    found = []
    for index, line in enumerate(file.read_text("utf-8").splitlines()):
        row = json.loads(line)
        connector = CONNECTORS[language][row["question"] == "effect"]
        prompt = model.encode(row["premise"].strip().rstrip(".。") + connector)
        first, second = (_continued(model, row[name]) for name in ("choice1", "choice2"))
        found.append(Question(language, index, prompt, (first, second), int(row["label"])))
    return found


def _continued(model: LocalModel, text: str) -> list[int]:
    """A sentence's tokens inside of another one: its first letter small."""
    text = text.strip()
    return model.encode(f" {text[0].lower()}{text[1:]}", special=False)


def fitted(source: np.ndarray, english: np.ndarray, seed: int) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """The tensors of the arms, by layer and role."""
    rng = np.random.default_rng(seed)
    maps = incline.fit(source, english, incline.Config("x"))
    found: dict[str, dict[int, dict[str, np.ndarray]]] = {arm: {} for arm in (*ARMS, "bias")}
    for layer, each in enumerate(maps):
        h = source[:, layer].astype(np.float64)
        assert each.bias is not None
        found["incline"][layer] = {"matrix": each.dense}
        found["bias"][layer] = {"vector": each.bias}
        drawn = rng.standard_normal(each.dense.shape)
        length = np.linalg.norm(each.predict(h), axis=1).mean() / np.linalg.norm(h @ drawn.T, axis=1).mean()
        found["random"][layer] = {"matrix": (drawn * length).astype(np.float32)}
        found["caa"][layer] = {"vector": (english[:, layer] - source[:, layer]).mean(0)}
    return found


def edits(question: Question, arm: str, alpha: float, layers: int) -> tuple[Edit, ...]:
    """Put the clean states back, then edit: mode `frozen`."""
    if arm == "none":
        return ()
    where, every = Span(False, False, (len(question.prompt) - 1,)), tuple(range(layers))
    clean = Edit("set", f"clean.{question.language}.{question.index}", every, 1.0, where)
    if arm == "identity":
        return clean, Edit("scale", f"identity.{question.language}", every, alpha, where)
    opcode = "add" if arm == "caa" else "map"
    changed = clean, Edit(opcode, f"{arm}.{question.language}", every, alpha, where)
    return (*changed, Edit("add", f"bias.{question.language}", every, alpha, where)) if arm == "incline" else changed


def margins(model: LocalModel, asked: list[Question], arm: str, alpha: float) -> np.ndarray:
    """By question, how much likelier the right choice's tokens are on average, in nats."""
    requests = [
        Request(q.prompt + choice, len(choice), edits(q, arm, alpha, model.layers))
        for q in asked
        for choice in q.choices
    ]
    means = np.array([each.mean() for each in model.log_probabilities(requests)]).reshape(-1, 2)
    sign = np.array([1 if q.right == 0 else -1 for q in asked])
    return (means[:, 0] - means[:, 1]) * sign


def language_results(
    model: LocalModel, asked: list[Question], seen: dict[str, np.ndarray], code: str, alphas: list[float], kept: Kept
) -> dict[str, Any]:
    started = time.monotonic()
    tensors = fitted(seen[LANGUAGES[code]][:FITTED], seen["eng"][:FITTED], seed=0)
    for arm, by_layer in tensors.items():
        model.upload(f"{arm}.{code}", by_layer)
    width = seen["eng"].shape[2]
    model.upload(f"identity.{code}", {layer: {"mask": np.ones(width, np.float32)} for layer in range(model.layers)})
    clean = model.last_states([q.prompt for q in asked])
    for question, state in zip(asked, clean, strict=True):
        key = f"clean.{question.language}.{question.index}"
        model.upload(key, {layer: {"vector": row} for layer, row in enumerate(state)})
    halves = {"tune": asked[0::2], "test": asked[1::2]}

    def scored(half: str, arm: str, alpha: float) -> np.ndarray:
        name = f"{code} {half} {arm} {alpha:g}"
        return np.array(kept.part(name, lambda: margins(model, halves[half], arm, alpha).tolist()))

    tuned = {arm: {alpha: scored("tune", arm, alpha) for alpha in alphas} for arm in ARMS}
    best = {arm: max(alphas, key=lambda a, arm=arm: _score(tuned[arm][a])) for arm in ARMS}
    found = {"none": scored("test", "none", 0.0), "identity": scored("test", "identity", best["incline"])}
    found |= {arm: scored("test", arm, best[arm]) for arm in ARMS}
    untouched = float((scored("tune", "none", 0.0) > 0).mean())
    return {
        "alpha": best | {"identity": best["incline"]},
        "tune": {arm: {f"{a:g}": float((m > 0).mean()) for a, m in by.items()} for arm, by in tuned.items()}
        | {"none": untouched},
        "margins": {arm: values.tolist() for arm, values in found.items()},
        "seconds": time.monotonic() - started,
    }


def _score(found: np.ndarray) -> tuple[float, float]:
    """Accuracy, and of equals the mean margin."""
    return float((found > 0).mean()), float(found.mean())


def measure(options: argparse.Namespace) -> None:
    """Publishes after every language."""
    ntrex = options.data / "parallel" / "ntrex128"
    seen, _ = states(ntrex, options.states, options.model, [LANGUAGES[code] for code in options.languages])
    weights = model_identity(str(options.model))["weights_digest"]
    # Neither languages nor alphas: more of them may be added to what is kept.
    parts = len(options.languages) * (len(ARMS) * (len(options.alphas) + 1) + 3)
    kept = Kept(options.states, "incline_effect", {"model": weights, "questions": options.questions}, parts)
    rows: dict[str, Any] = {}
    model = LocalModel(options.model)
    for code in options.languages:
        asked = questions(model, options.data / "tasks" / "xcopa" / f"val.{code}.jsonl", code)
        rows[code] = language_results(model, asked[: options.questions], seen, code, options.alphas, kept)
        right = {arm: float((np.array(m) > 0).mean()) for arm, m in rows[code]["margins"].items()}
        print(code, right, rows[code]["alpha"], f"{rows[code]['seconds']:.0f} s", flush=True)
        results = summed(options, {each: rows[each] for each in options.languages if each in rows})
        publish("incline_effect", results, section(results))


def summed(options: argparse.Namespace, rows: dict[str, Any]) -> dict[str, Any]:
    pooled = {
        arm: np.concatenate([row["margins"][arm] for row in rows.values()]) for arm in ("none", "identity", *ARMS)
    }
    others = [arm for arm in pooled if arm != "incline"]
    return {
        "model": options.model.name,
        "alphas": options.alphas,
        "questions": {"tune": (options.questions + 1) // 2, "test": options.questions // 2},
        "languages": rows,
        "accuracy": {arm: float((m > 0).mean()) for arm, m in pooled.items()},
        "margin": {arm: float(m.mean()) for arm, m in pooled.items()},
        "incline_minus": {arm: paired(pooled["incline"] > 0, pooled[arm] > 0) for arm in others},
        "incline_minus_margin": {arm: paired(pooled["incline"], pooled[arm]) for arm in others},
        "environment": environment(),
    }


def section(results: dict[str, Any]) -> str:
    arms = ("none", "identity", "random", "caa", "incline")
    lines = []
    for code, row in results["languages"].items():
        cells = []
        for arm in arms:
            right = float((np.array(row["margins"][arm]) > 0).mean())
            chosen = f" ({row['alpha'][arm]:g})" if arm in ARMS else ""
            cells.append(f"{right:.0%}{chosen}")
        lines.append(f"| {code} | {' | '.join(cells)} |")
    overall = " | ".join(f"**{results['accuracy'][arm]:.1%}**" for arm in arms)

    def differences(name: str, form: str) -> str:
        found = results[name]
        cells = (
            f"{format(found[arm]['difference'], form)} ({format(found[arm]['low'], form)} to "
            f"{format(found[arm]['high'], form)})"
            for arm in arms[:-1]
        )
        return " | ".join(cells)

    counts = results["questions"]
    return f"""## INCLINE: choosing causes and effects

`benchmarks/incline_effect.py`: {results["model"]}, XCOPA validation, for each language {counts["tune"]} questions to
choose α from {", ".join(f"{alpha:g}" for alpha in results["alphas"])} and {counts["test"]} others, on which the table
reports accuracy (with the α chosen). Last prompt token, all layers, mode `frozen`. In this mode the identity only makes
a state longer, which the norms behind it undo: it is a check that nothing else happens.

| language | none | identity | random map | CAA | INCLINE |
|---|---:|---:|---:|---:|---:|
{chr(10).join(lines)}
| all | {overall} |
| INCLINE minus it | {differences("incline_minus", "+.1%")} | |
| the same for the margin, nats a token | {differences("incline_minus_margin", "+.3f")} | |

In accuracy INCLINE is {verdict(results["incline_minus"])} beyond the 95% interval (paired bootstrap over questions); by
the margin between the right choice and the wrong one it is {verdict(results["incline_minus_margin"])}.

Measured {describe(results["environment"])}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("POLYHELM_BENCH_DATA", "data")))
    parser.add_argument("--states", type=Path, required=True, help="a folder to keep captured states in, and results")
    parser.add_argument("--languages", nargs="+", choices=LANGUAGES, default=list(LANGUAGES))
    parser.add_argument("--questions", type=int, default=100, help="per language, half of them to choose alpha")
    parser.add_argument("--alphas", nargs="+", type=float, default=list(ALPHAS))
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
