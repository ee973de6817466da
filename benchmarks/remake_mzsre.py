"""ReMaKE on MzsRE: do facts in one language change the answers in another? From English to 12 languages, and back.

Prompts are made as the server makes them: nearest facts, scope decision, the paper's template; out of scope the plain
`Question: ... Answer:`. Per direction and arm (`pre`: no facts; `zero`; `mono-16`; `bi-2` to `bi-16` examples):
reliability (`src`), generality (`rephrase`) and portability, as exact match in percent, and locality (`loc`), the
share of answers that are the unedited model's own. `forced` as the paper's released code computes it, the likeliest
token at every position of the gold answer; `free` the first line of a greedy answer, normalised. Each answer is a line
of --log, and a run that was interrupted goes on. Writes results/remake_mzsre.json.

    POLYHELM_BENCH_DATA=... .venv/bin/python benchmarks/remake_mzsre.py --model MODEL_FOLDER --items 50
"""

from __future__ import annotations

import argparse
import json
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mzsre
import numpy as np
from cached_encoder import CachedEncoder
from environment import environment
from lm_answers import Answers
from remake_scope import DIRECTIONS, deciders

from kb import encoders
from kb.collection import Collection
from kb.facts import FactDraft
from kb.knowledge_base import KnowledgeBase
from kb.languages import identified
from kb.lookup import find
from kb.remake import Example, Pair, remake_prompt
from kb.scope import Decider, Text

RESULTS = Path(__file__).with_name("results") / "remake_mzsre.json"
ARMS = ("pre", "zero", "mono-16", "bi-2", "bi-4", "bi-8", "bi-16")
KINDS = {"src": "reliability", "rephrase": "generality", "portability": "portability", "loc": "locality"}
PAPER_BLOOMZ_560M = {
    "arm": "bi-16, reliability, English facts, as read off figure 4b",
    **{"de": 39, "vi": 37, "cs": 35, "nl": 34, "pt": 32, "es": 31, "tr": 31, "fr": 30, "zh": 16, "th": 5, "ru": 4},
}


class Task(NamedTuple):
    """One prompt. `key` is its name in the log."""

    key: str
    prompt: str
    gold: str


class Prompts:
    """Writes prompts for one language of facts; `pool` are training pairs by language, line-aligned."""

    def __init__(
        self, collection: Collection, pool: dict[str, list[mzsre.QA]], vectors: np.ndarray, language: str
    ) -> None:
        self.collection, self.pool, self.vectors, self.language = collection, pool, vectors, language

    def arms(
        self, decider: Decider, question: str, vector: np.ndarray, asked: str, arms: Sequence[str]
    ) -> dict[str, str]:
        plain = f"Question: {question} Answer:"
        found = find(self.collection, decider, Text(question, identified(question).language, vector))
        if not found or found[0].probability < 0.5:
            return {arm: plain for arm in arms}
        fact = found[0].fact
        (key,) = self.collection.vectors([fact])
        nearest = [int(n) for n in np.argsort(-(self.vectors @ key), kind="stable")]
        made = {"pre": plain}
        for arm in arms[1:]:
            form, _, count = arm.partition("-")
            examples = [self.example(n, form, asked) for n in nearest[: int(count or 0)]]
            made[arm] = remake_prompt(question, [fact], examples)
        return made

    def example(self, number: int, form: str, asked: str) -> Example:
        pair = Pair(*self.pool[self.language][number])
        if form == "mono" or asked == self.language:
            return Example(pair)
        return Example(pair, Pair(*self.pool[asked][number]))


def tasks(options: argparse.Namespace, encoder: CachedEncoder, decider: Decider, folder: str) -> Iterator[Task]:
    items = mzsre.items()
    base = KnowledgeBase.open(folder)
    pool = {language: rows[: options.training] for language, rows in mzsre.training().items()}
    tested = range(mzsre.DEV, mzsre.DEV + options.items)
    for facts in dict.fromkeys(facts for facts, _ in options.directions):
        drafts = [
            FactDraft(id=str(n), question=item[facts].src.question, answer=item[facts].src.answer, language=facts)
            for n, item in enumerate(items)
        ]
        collection, _ = base.create(f"mzsre-{facts}", encoder.identity, "keep")
        collection.upsert(drafts, encoder.encode_queries([draft.question or "" for draft in drafts]))
        shots = encoder.encode_queries([qa.question for qa in pool[facts]])
        prompts = Prompts(collection, pool, shots, facts)
        for asked in (asked for each, asked in options.directions if each == facts):
            for kind in options.kinds:
                questions: list[mzsre.QA] = [getattr(items[n][asked], kind) for n in tested]
                rows = encoder.encode_queries([qa.question for qa in questions])
                for n, qa, row in zip(tested, questions, rows, strict=True):
                    made = prompts.arms(decider, qa.question, row, asked, options.arms)
                    for arm, prompt in made.items():
                        yield Task(f"{facts}>{asked}|{kind}|{arm}|{n}", prompt, qa.answer)


def run(options: argparse.Namespace, asked: Sequence[Task], log: Path) -> dict[str, dict[str, Any]]:
    """By key: the tokens that forcing gave, the gold ones, and the free answer."""
    done = {row["key"]: row for row in map(json.loads, log.read_text("utf-8").splitlines())} if log.exists() else {}
    left = [task for task in asked if task.key not in done]
    print(f"{len(asked)} prompts, {len(left)} of them to run", flush=True)
    if not left:
        return done
    model = Answers(options.model)
    with log.open("a", encoding="utf-8") as file:
        for start in range(0, len(left), options.batch):
            part = left[start : start + options.batch]
            # The same prompt comes several times where a question is out of scope.
            unique = list({(task.prompt, task.gold): task for task in part}.values())
            forced = model.forced([task.prompt for task in unique], [task.gold for task in unique])
            free = model.free([task.prompt for task in unique])
            answers = {(task.prompt, task.gold): each for task, *each in zip(unique, forced, free, strict=True)}
            for task in part:
                tokens, text = answers[task.prompt, task.gold]
                row = {
                    "key": task.key,
                    "forced": tokens,
                    "gold": model.gold(task.gold),
                    "free": text,
                    "want": task.gold,
                }
                done[task.key] = row
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            print(f"{start + len(part)}/{len(left)}", flush=True)
    return done


def normal(text: str) -> str:
    """Lower case, without punctuation and double spaces."""
    kept = "".join(" " if unicodedata.category(each)[0] == "P" else each for each in text.casefold())
    return " ".join(kept.split())


def score(rows: dict[str, dict[str, Any]], key: str, kind: str) -> tuple[bool, bool]:
    """Forced and free: right, or for `loc` as without any facts."""
    row = rows[key]
    if kind == "loc":
        direction, _, _, number = key.split("|")
        before = rows[f"{direction}|loc|pre|{number}"]
        return row["forced"] == before["forced"], normal(row["free"]) == normal(before["free"])
    return row["forced"] == row["gold"], normal(row["free"]) == normal(row["want"])


def summary(rows: dict[str, dict[str, Any]], asked: Sequence[Task]) -> dict[str, Any]:
    """Percent by measure, way of answering, arm and direction."""
    found: dict[tuple[str, str, str], list[tuple[bool, bool]]] = {}
    for task in asked:
        direction, kind, arm, _ = task.key.split("|")
        found.setdefault((kind, arm, direction), []).append(score(rows, task.key, kind))
    report: dict[str, Any] = {}
    for (kind, arm, direction), marks in found.items():
        for way, values in zip(("forced", "free"), zip(*marks, strict=True), strict=True):
            place = report.setdefault(KINDS[kind], {}).setdefault(way, {}).setdefault(arm, {})
            place[direction] = round(100 * float(np.mean(values)), 1)
    return report


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--items", type=int, default=50, help="of the 200 test items")
    parser.add_argument("--directions", nargs="+", default=[f"{a}>{b}" for a, b in DIRECTIONS], metavar="en>de")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument(
        "--training", type=int, default=1990, help="training questions, for the decider and as examples"
    )
    parser.add_argument("--cache", type=Path, help="a folder for vectors")
    parser.add_argument("--log", type=Path, default=Path("remake_mzsre.jsonl"))
    parser.add_argument("--batch", type=int, default=256)
    options = parser.parse_args()
    options.directions = [tuple(each.split(">")) for each in options.directions]
    options.arms = ["pre", *(arm for arm in options.arms if arm != "pre")]
    return options


def main() -> None:
    options = arguments()
    encoder = CachedEncoder(encoders.load("e5-small"), options.cache)
    decider = deciders(encoder, options.training, false_fires=0.015)["head"]
    with tempfile.TemporaryDirectory() as folder:
        asked = list(tasks(options, encoder, decider, folder))
    report = summary(run(options, asked, options.log), asked)
    for measure, ways in report.items():
        for way, arms in ways.items():
            for arm, shares in arms.items():
                print(f"{measure:12} {way:7} {arm:8} {np.mean(list(shares.values())):5.1f}  {shares}")
    settings = {"model": options.model.name, "items": options.items, "training": options.training}
    content = {"environment": environment(), **settings, "percent": report, "paper_bloomz_560m": PAPER_BLOOMZ_560M}
    RESULTS.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
