"""Do SADI and CAA make the model answer as wished, more than no steering, a random mask and a fixed vector?

Fits on one part of a task's questions, chooses each arm's setting on a second part, and reports the share of wished
answers on the third, with paired bootstrap intervals: SADI's released code takes the best on the test set. An answer is
the likelier of two words after the prompt, and all arms act on the prompt's last token, as SADI does. Writes
results/sadi_effect.json and a section of docs/results.md. An interrupted run goes on behind the last setting, kept in
--work.

SADI scales the attention heads that differ most between right and wrong answers (methods/sadi.py); `random` scales as
many heads drawn at random; `fixed` adds SADI's masked mean difference to the same heads; CAA adds the mean difference
of one layer's residual stream (methods/caa.py).

The data folder has tasks/truthfulqa (TruthfulQA, Lin et al. 2022, Apache-2.0; is an answer true, yes or no?),
tasks/boolq (BoolQ, Clark et al. 2019, CC-BY-SA-3.0), steering/caa (contrastive A/B pairs of Rimsky et al. 2024, MIT;
the wished answer is the one that shows the behaviour) and steering/sentiment_cad (film reviews of Kaushik et al. 2020,
Apache-2.0).

BoolQ's rows here all have the answer yes. So `boolq` reports the margin between yes and no, in nats, rather than a
share, and a push towards yes is all that it can show: what counts is the difference from the random mask and the fixed
vector. `boolq-checked` asks in turn whether yes, and whether no, is the right answer, which such a push doesn't help.

    POLYHELM_BENCH_DATA=DATA .venv/bin/python benchmarks/sadi_effect.py --model polyhelm-data/models/smollm2 --work WORK
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from environment import describe, environment
from kept import Kept
from local_model import LocalModel
from results_page import publish
from spread import paired, verdict

from methods import caa, sadi
from server.engine.edits import Edit
from server.engine.spans import Span
from server.models import model_identity

ARMS = ("none", "sadi", "random", "fixed", "caa")
TOP_K = (2, 10)
STRENGTHS = (1.0, 4.0, 9.0, 29.0)
LAYERS = (8, 14, 20)
CAA_STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
SEED = 0
LAST_TOKEN = Span(prompt=False, generation=False, prompt_positions=(-1,))


class Question(NamedTuple):
    """`right` and `wrong` follow the prompt as they are, a leading space included."""

    prompt: str
    right: str
    wrong: str


class Setting(NamedTuple):
    """One way to steer: `place` is SADI's number of heads, or CAA's layer; nothing to choose for `none`."""

    arm: str
    place: int = 0
    strength: float = 0.0


@dataclass(frozen=True)
class Task:
    """`by_margin`: scored by how much likelier the wished answer is, in nats, instead of whether it is."""

    name: str
    by_margin: bool
    fit: list[Question]
    tune: list[Question]
    test: list[Question]


def truth(data: Path) -> list[Question]:
    """A true and a false answer to the questions in turn."""
    rows, asked = json.loads((data / "tasks/truthfulqa/mc_task.json").read_text("utf-8")), []
    for index, row in enumerate(rows):
        is_true = index % 2 == 0
        answer = next(text for text, right in row["mc1_targets"].items() if right == is_true)
        words = (" yes", " no") if is_true else (" no", " yes")
        asked.append(
            Question(f"Question: {row['question']}\nAnswer: {answer}\nIs this answer true, yes or no?", *words)
        )
    return asked


def boolq(data: Path, checked: bool) -> list[Question]:
    """As they are, or checked: whether yes, and whether no, is the right answer, in turn."""
    asked = []
    for index, line in enumerate((data / "tasks/boolq/boolq_head600.jsonl").read_text("utf-8").splitlines()):
        row = json.loads(line)
        prompt = f"{row['passage']}\nQuestion: {row['question']}?\n"
        if checked:
            proposed = index % 2 == 0
            prompt += f"Answer: {'yes' if proposed else 'no'}\nIs this answer right, yes or no?"
            right = proposed == row["answer"]
        else:
            prompt += "Answer, yes or no:"
            right = row["answer"]
        asked.append(Question(prompt, *((" yes", " no") if right else (" no", " yes"))))
    return asked


def behaviour(data: Path, name: str) -> list[Question]:
    """Of the questions with two answers."""
    rows = json.loads((data / f"steering/caa/generate.{name}.generate_dataset.json").read_text("utf-8"))
    names = ("answer_matching_behavior", "answer_not_matching_behavior")
    pairs = [(f"{row['question']}\n\nAnswer: (", *(row[name].strip(" ()") for name in names)) for row in rows]
    return [Question(*pair) for pair in pairs if set(pair[1:]) == {"A", "B"}]


def sentiment(data: Path) -> list[Question]:
    with (data / "steering/sentiment_cad/test_paired.tsv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    words = {"Positive": (" positive", " negative"), "Negative": (" negative", " positive")}
    return [Question(f"Review: {row['Text']}\nSentiment:", *words[row["Sentiment"]]) for row in rows]


def split(name: str, questions: list[Question], fit: int, tune: int, test: int) -> Task:
    """The shortest ones, shuffled once; where there are too few, all parts are smaller alike."""
    share = min(1.0, len(questions) / (fit + tune + test))
    fit, tune, test = (int(size * share) for size in (fit, tune, test))
    short = sorted(questions, key=lambda each: len(each.prompt))[: fit + tune + test]
    random.Random(SEED).shuffle(short)
    by_margin = len({each.right for each in short}) < 2
    return Task(name, by_margin, short[:fit], short[fit : fit + tune], short[fit + tune : fit + tune + test])


def settings() -> list[Setting]:
    masks = [Setting(arm, top_k, s) for arm in ("sadi", "random", "fixed") for top_k in TOP_K for s in STRENGTHS]
    return [Setting("none"), *masks, *(Setting("caa", layer, s) for layer in LAYERS for s in CAA_STRENGTHS)]


def edits(setting: Setting, task: str, layers: dict[str, tuple[int, ...]]) -> tuple[Edit, ...]:
    if setting.arm == "none":
        return ()
    if setting.arm == "caa":
        return (Edit("add", f"{task}.caa", (setting.place,), setting.strength, LAST_TOKEN),)
    key = f"{task}.{setting.arm}.{setting.place}"
    opcode = "add" if setting.arm == "fixed" else "scale"
    return (Edit(opcode, key, layers[key], setting.strength, LAST_TOKEN, "head_out"),)


def fit(model: LocalModel, task: Task, heads: int) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Uploads every arm's operands; the layers of each, and what SADI chose."""
    positive, negative = (
        [q.prompt + answer for q, answer in zip(task.fit, side, strict=True)] for side in _sides(task)
    )
    width, layers, chosen = model.width("head_out"), {}, {}
    both = [model.last_states_at(side, ("head_out", "resid_post")) for side in (positive, negative)]
    contexts, states = ([side[point] for side in both] for point in ("head_out", "resid_post"))
    block = width // heads
    for top_k in TOP_K:
        found = sadi.fit(contexts[0], contexts[1], sadi.Config(top_k=top_k), heads)
        places = random.Random(SEED + top_k).sample(range(model.layers * heads), top_k)
        drawn: dict[int, list[int]] = {}
        for layer, head in sorted(divmod(place, heads) for place in places):
            drawn.setdefault(layer, []).extend(range(head * block, (head + 1) * block))
        by_arm = {
            "sadi": {layer: {"mask": _mask(indices, width)} for layer, indices in found.indices.items()},
            "random": {layer: {"mask": _mask(np.array(indices), width)} for layer, indices in drawn.items()},
            "fixed": {layer: {"vector": vector} for layer, vector in found.vectors.items()},
        }
        for arm, tensors in by_arm.items():
            key = f"{task.name}.{arm}.{top_k}"
            model.upload(key, tensors, "head_out")
            layers[key] = tuple(sorted(tensors))
        chosen[str(top_k)] = {"heads": found.selected, "stability": found.stability}
    vectors = caa.fit(states[0], states[1], caa.Config()).vectors
    model.upload(f"{task.name}.caa", {layer: {"vector": vectors[layer]} for layer in LAYERS})
    return layers, chosen


def _sides(task: Task) -> tuple[list[str], list[str]]:
    return [q.right for q in task.fit], [q.wrong for q in task.fit]


def _mask(indices: np.ndarray, width: int) -> np.ndarray:
    mask = np.zeros(width, np.float32)
    mask[indices] = 1
    return mask


def answers(
    model: LocalModel,
    kept: Kept,
    part: str,
    asked: list[Question],
    wanted: list[Setting],
    layers: dict[str, tuple[int, ...]],
) -> dict[Setting, np.ndarray]:
    """How much likelier the wished answer to each question is, in nats, in each setting. The first setting leaves the
    prompts in the prefix cache for the others. `part` is the task, and the part of its questions.
    """
    task = part.partition(" ")[0]
    words = sorted([asked[0].right, asked[0].wrong])
    tokens = [model.encode(word, special=False)[0] for word in words]
    if len(set(tokens)) < 2:
        raise ValueError(f"{words} begin with the same token")
    prompts = [model.encode(question.prompt) for question in asked]
    right = np.array([words.index(question.right) for question in asked])

    def margins(setting: Setting) -> list[float]:
        program = edits(setting, task, layers)
        logits = model.next_logits([(prompt, program) for prompt in prompts], tokens)
        found: list[float] = (logits[np.arange(len(asked)), right] - logits[np.arange(len(asked)), 1 - right]).tolist()
        return found

    return {
        setting: np.array(
            kept.part(f"{part} {setting.arm} {setting.place} {setting.strength:g}", lambda s=setting: margins(s))
        )
        for setting in wanted
    }


def run_task(model: LocalModel, task: Task, heads: int, kept: Kept) -> dict[str, Any]:
    started = time.monotonic()
    layers, chosen = fit(model, task, heads)
    fitted = time.monotonic() - started
    margins = answers(model, kept, f"{task.name} tune", task.tune, settings(), layers)
    tuned = {setting: _scored(each, task) for setting, each in margins.items()}
    best = {arm: max((s for s in tuned if s.arm == arm), key=lambda s: float(tuned[s].mean())) for arm in ARMS}
    reported = answers(model, kept, f"{task.name} test", task.test, list(best.values()), layers)
    found = {arm: _scored(reported[best[arm]], task) for arm in ARMS}
    commonest = max(float(np.mean([q.right == word for q in task.test])) for word in {q.right for q in task.test})
    return {
        "questions": {"fit": len(task.fit), "tune": len(task.tune), "test": len(task.test)},
        "majority": commonest,
        "by_margin": task.by_margin,
        "fit_seconds": fitted,
        "sadi": chosen,
        "tune": [{**each._asdict(), "accuracy": float(right.mean())} for each, right in tuned.items()],
        "arms": {
            arm: best[arm]._asdict() | {"tuned": float(tuned[best[arm]].mean()), "accuracy": float(right.mean())}
            for arm, right in found.items()
        },
        "sadi_minus": {arm: paired(found["sadi"], found[arm]) for arm in ARMS if arm != "sadi"},
        "caa_minus": {arm: paired(found["caa"], found[arm]) for arm in ARMS if arm != "caa"},
        "seconds": time.monotonic() - started,
    }


def _scored(margins: np.ndarray, task: Task) -> np.ndarray:
    scores: np.ndarray = margins if task.by_margin else (margins > 0).astype(float)
    return scores


def measure(options: argparse.Namespace) -> None:
    """Publishes after every task."""
    found: dict[str, Any] = {}
    tasks = {
        "truthfulqa": lambda: truth(options.data),
        options.behaviour: lambda: behaviour(options.data, options.behaviour),
        "sentiment": lambda: sentiment(options.data),
        "boolq": lambda: boolq(options.data, checked=False),
        "boolq-checked": lambda: boolq(options.data, checked=True),
    }
    heads = int(json.loads((options.model / "config.json").read_text("utf-8"))["num_attention_heads"])
    # Of a prompt that is in the prefix cache only the last, unfinished block is run again: small ones are quick.
    model = LocalModel(options.model, ("head_out",), 2048, 768, block_size=32)
    sizes = options.fit, options.tune, options.test
    decisive = {"model": model_identity(str(options.model))["weights_digest"], "sizes": sizes, "seed": SEED}
    kept = Kept(options.work, "sadi_effect", decisive, len(tasks) * (len(settings()) + len(ARMS)))
    for name, load in tasks.items():
        found[name] = run_task(model, split(name, load(), *sizes), heads, kept)
        shown = {arm: round(row["accuracy"], 3) for arm, row in found[name]["arms"].items()}
        print(name, shown, f"{found[name]['seconds']:.0f} s", flush=True)
        results = {"model": options.model.name, "tasks": found, "environment": environment()}
        publish("sadi_effect", results, section(results))


def section(results: dict[str, Any]) -> str:
    def minus(task: dict[str, Any], method: str, arm: str) -> str:
        if arm == method:
            return ""
        each, form = task[f"{method}_minus"][arm], "+.3f" if task.get("by_margin") else "+.1%"
        difference, low, high = (format(each[name], form) for name in ("difference", "low", "high"))
        return f"{difference} ({low} to {high})"

    parts = []
    for name, task in results["tasks"].items():
        table, score = [], ".3f" if task.get("by_margin") else ".1%"
        for arm, row in task["arms"].items():
            place = f"layer {row['place']}" if arm == "caa" else f"{row['place']} heads"
            chosen = "" if arm == "none" else f"{place}, {row['strength']:g}"
            table.append(
                f"| {arm} | {chosen} | {format(row['tuned'], score)} | {format(row['accuracy'], score)} "
                f"| {minus(task, 'sadi', arm)} | {minus(task, 'caa', arm)} |"
            )
        counts = task["questions"]
        tried = {arm: [row["accuracy"] for row in task["tune"] if row["arm"] == arm] for arm in ("sadi", "caa")}
        worse = {arm: sum(each < task["arms"]["none"]["tuned"] for each in tried[arm]) for arm in tried}
        measured = (
            "All have the same wished answer: the table has by how many nats it is likelier, and a push towards it is "
            "all that is measured."
            if task.get("by_margin")
            else f"The commoner answer is the wished one for {task['majority']:.1%} of these."
        )
        parts.append(f"""### {name}

{counts["fit"]} questions to fit, {counts["tune"]} to tune, {counts["test"]} to test. {measured}

| arm | chosen: place, strength | wished, tuning | wished, test | SADI minus it (95% interval) | CAA minus it |
|---|---|---:|---:|---:|---:|
{chr(10).join(table)}

SADI is {verdict(task["sadi_minus"])} beyond the interval; CAA is {verdict(task["caa_minus"])}. On the tuning questions
{worse["sadi"]} of SADI's {len(tried["sadi"])} settings and {worse["caa"]} of CAA's {len(tried["caa"])} are worse than
no steering. Of SADI's ten heads {task["sadi"]["10"]["stability"]:.0%} are chosen by both halves of the fitting
questions.""")
    return f"""## SADI and CAA: against no steering, a random mask and a fixed vector

`benchmarks/sadi_effect.py`: {results["model"]}, mode live, the prompt's last token. Each arm's place and strength were
chosen on the tuning questions and used once on the test questions.

{(chr(10) * 2).join(parts)}

Measured {describe(results["environment"])}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("POLYHELM_BENCH_DATA", "data")))
    parser.add_argument("--work", type=Path, required=True, help="a folder to keep finished tasks in")
    parser.add_argument("--behaviour", default="survival-instinct", help="a data set of steering/caa")
    parser.add_argument("--fit", type=int, default=150, help="questions per task to fit on")
    parser.add_argument("--tune", type=int, default=200, help="others, to choose place and strength on")
    parser.add_argument("--test", type=int, default=250, help="others, at most, to report on")
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
