"""ReMaKE on MzsRE: do facts in one language change the answers in another? From English to 12 languages, and back.

Prompts are made as the server makes them: nearest facts, scope decision, the paper's template; out of scope the plain
`Question: ... Answer:`. Per direction and arm (`pre`: no facts; `zero`; `mono-16`; `bi-2` to `bi-16` examples):
reliability (`src`), generality (`rephrase`) and portability, as exact match in percent, and locality (`loc`), the
share of answers that are the unedited model's own. `forced` as the paper's released code computes it, the likeliest
token at every position of the gold answer; `free` the first line of a greedy answer, normalised.

Each answer is a line of --log, by the model's weights, the prompt and the gold answer: a run that was interrupted goes
on, and one with more items, or another decider, asks only what is new. Writes results/remake_mzsre.json and a section
of docs/results.md, or with --output another file; a run of only some directions, arms or kinds, or of the items for
choosing (--dev), needs --output.

    POLYHELM_BENCH_DATA=... .venv/bin/python benchmarks/remake_mzsre.py --model MODEL_FOLDER --items 50
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mzsre
import numpy as np
from cached_encoder import CachedEncoder
from environment import describe, environment
from lm_answers import Answers, Asked
from remake_scope import COLUMNS, DIRECTIONS, fitted_decider, training_groups
from results_page import publish
from spread import paired

from kb import encoders
from kb.collection import Collection
from kb.facts import FactDraft
from kb.knowledge_base import KnowledgeBase
from kb.languages import identified
from kb.lookup import find
from kb.remake import Example, Pair, remake_prompt
from kb.scope import Decider, Text

ARMS = ("pre", "zero", "mono-16", "bi-2", "bi-4", "bi-8", "bi-16")
KINDS = {"src": "reliability", "rephrase": "generality", "portability": "portability", "loc": "locality"}
WAYS = ("forced", "free")
BEST = "bi-16"
PAPER_BLOOMZ_560M = {
    "arm": "bi-16, reliability, forced, English facts, as read off figure 4b",
    **{"de": 39, "vi": 37, "cs": 35, "nl": 34, "pt": 32, "es": 31, "tr": 31, "fr": 30, "zh": 16, "th": 5, "ru": 4},
}


class Task(NamedTuple):
    """One prompt of one arm, and what it is about."""

    facts: str
    language: str
    kind: str
    arm: str
    item: int
    asked: Asked


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
        nearest = [int(n) for n in np.argsort(-(self.vectors @ found[0].vector), kind="stable")]
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
    first = 0 if options.dev else mzsre.DEV
    tested = range(first, first + options.items)
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
                        yield Task(facts, asked, kind, arm, n, Asked(prompt, qa.answer, whole=kind == "loc"))


class Log:
    """Answers on disk, one a line."""

    def __init__(self, file: Path, model: Path) -> None:
        self._file = file
        with (model / "model.safetensors").open("rb") as weights:
            self._model = hashlib.file_digest(weights, "sha256").hexdigest()
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            # The process ended in the middle of it.
            file.write_bytes(b"".join(lines[:-1]))
            del lines[-1]
        self._rows: dict[str, dict[str, Any]] = {row["key"]: row for row in map(json.loads, lines)}

    def __contains__(self, asked: Asked) -> bool:
        return self._key(asked) in self._rows

    def __getitem__(self, asked: Asked) -> dict[str, Any]:
        """`forced` and `gold` as tokens, `free` and `want` as text."""
        return self._rows[self._key(asked)]

    def add(self, rows: Sequence[tuple[Asked, list[int], list[int], str]]) -> None:
        """With the forced tokens, the gold ones, and the free answer."""
        with self._file.open("a", encoding="utf-8") as file:
            for asked, forced, gold, free in rows:
                row = {"key": self._key(asked), "forced": forced, "gold": gold, "free": free, "want": asked.gold}
                self._rows[row["key"]] = row
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def _key(self, asked: Asked) -> str:
        return hashlib.sha256(json.dumps([self._model, *asked]).encode()).hexdigest()


def run(options: argparse.Namespace, tasks: Sequence[Task], log: Log) -> None:
    """Item by item, so that what is there after some time is whole; prompts that begin alike next to each other."""
    first = {}
    for task in sorted(tasks, key=lambda task: (task.item, task.asked)):
        if task.asked not in log:
            first.setdefault(task.asked, task)
    left = list(first)
    print(f"{len(tasks)} prompts, {len({task.asked for task in tasks})} different, {len(left)} to run", flush=True)
    if not left:
        return
    model = Answers(options.model)
    started = time.monotonic()
    for start in range(0, len(left), options.batch):
        part = left[start : start + options.batch]
        log.add(
            [
                (asked, forced, model.gold(asked.gold), free)
                for asked, (forced, free) in zip(part, model.answer(part), strict=True)
            ]
        )
        done = start + len(part)
        pace = done / (time.monotonic() - started)
        print(f"{done}/{len(left)}, {pace:.1f} a second, {(len(left) - done) / pace / 60:.0f} min left", flush=True)


def normal(text: str) -> str:
    """Lower case, without punctuation and double spaces."""
    kept = "".join(" " if unicodedata.category(each)[0] == "P" else each for each in text.casefold())
    return " ".join(kept.split())


def right(row: dict[str, Any], before: dict[str, Any] | None) -> tuple[bool, bool]:
    """Forced and free: the gold answer, or what it was `before`."""
    if before is not None:
        return row["forced"] == before["forced"], normal(row["free"]) == normal(before["free"])
    return row["forced"] == row["gold"], normal(row["free"]) == normal(row["want"])


Marks = dict[tuple[str, str, str, str], list[bool]]
"""By measure, way of answering, arm and direction, item by item."""


def marks(tasks: Sequence[Task], log: Log) -> Marks:
    before = {(task.language, task.item): task.asked for task in tasks if (task.kind, task.arm) == ("loc", "pre")}
    found: Marks = {}
    for task in tasks:
        untouched = log[before[task.language, task.item]] if task.kind == "loc" else None
        for way, mark in zip(WAYS, right(log[task.asked], untouched), strict=True):
            key = (KINDS[task.kind], way, task.arm, f"{task.facts}>{task.language}")
            found.setdefault(key, []).append(mark)
    return found


def summary(found: Marks, arms: Sequence[str]) -> dict[str, Any]:
    """Percent, and means over the languages, English itself among them in both."""
    report: dict[str, Any] = {"percent": {}, "from_english": {}, "to_english": {}}
    for (measure, way, arm, direction), each in found.items():
        place = report["percent"].setdefault(measure, {}).setdefault(way, {}).setdefault(arm, {})
        place[direction] = round(100 * float(np.mean(each)), 1)
    for name, side in (("from_english", 0), ("to_english", 1)):
        for measure, ways in report["percent"].items():
            for way, by_arm in ways.items():
                for arm, shares in by_arm.items():
                    values = [share for direction, share in shares.items() if direction.split(">")[side] == "en"]
                    if values:
                        place = report[name].setdefault(measure, {}).setdefault(way, {})
                        place[arm] = round(float(np.mean(values)), 1)
    if {"zero", BEST} <= set(arms) and "reliability" in report["from_english"]:
        report["few_bi_against_zero"] = {way: _against_zero(found, report, way) for way in WAYS}
    return report


def _against_zero(found: Marks, report: dict[str, Any], way: str) -> dict[str, Any]:
    """Reliability with English facts: in which languages bi-16 is above zero-shot, and by how much on average."""
    shares = report["percent"]["reliability"][way]
    directions = [direction for direction in shares[BEST] if direction.startswith("en>")]
    above = [each for each in directions if shares[BEST][each] > shares["zero"][each]]
    means = [
        np.mean([found["reliability", way, arm, each] for each in directions], axis=0) * 100 for arm in (BEST, "zero")
    ]
    return {"above": above, "languages": len(directions), "minus": paired(means[0].tolist(), means[1].tolist())}


def section(results: dict[str, Any]) -> str:
    def table(name: str) -> str:
        means = results[name]
        cells = [
            [arm, *(f"{means[measure][way][arm]:.1f}" for measure in KINDS.values() for way in WAYS)] for arm in ARMS
        ]
        head = [f"{measure}, {way}" for measure in KINDS.values() for way in WAYS]
        return "\n".join(
            [
                f"| arm | {' | '.join(head)} |",
                "|---|" + "---:|" * len(head),
                *(f"| {' | '.join(row)} |" for row in cells),
            ]
        )

    languages = list(mzsre.LANGUAGES)
    directions = [f"en>{language}" for language in languages]
    shares = results["percent"]["reliability"]
    lines = [
        f"| {arm}, {way} | {' | '.join(f'{shares[way][arm][each]:.0f}' for each in directions)} |"
        for way in WAYS
        for arm in ("pre", "zero", "mono-16", BEST)
    ]
    paper = " | ".join(str(results["paper_bloomz_560m"].get(language, "")) for language in languages)
    against = "; ".join(
        f"{way}, in {len(each['above'])} of {each['languages']} languages, on average by"
        f" {each['minus']['difference']:+.1f} points ({each['minus']['low']:+.1f} to {each['minus']['high']:+.1f})"
        for way, each in results["few_bi_against_zero"].items()
    )
    return f"""## ReMaKE: facts in one language, answers in another

`benchmarks/remake_mzsre.py`: {results["model"]}, MzsRE, the first {results["items"]} of its 200 test items (as many
as there was time for), {results["facts"]} facts in the collection. Whether a question is about a fact is decided by
`{results["decider"]}` on e5-small, fitted on {results["training"]} training questions; the examples are from the same.
Percent, means over 12 languages, English among them. *Forced* is the paper's measure, which knows the gold answer's
tokens up to each one; *free* the first line of a greedy answer, without case and punctuation. Locality is the share of
answers that are the unedited model's.

Facts in English, questions in 12 languages:

{table("from_english")}

Facts in 12 languages, questions in English:

{table("to_english")}

Reliability by the question's language, facts in English, and the paper's bi-16 with BLOOMZ-560m, as read off its figure
4b (another model of twice the size, 743 items):

| | {" | ".join(languages)} |
|---|{"---:|" * len(languages)}
{chr(10).join(lines)}
| BLOOMZ-560m, bi-16, forced | {paper} |

Few-shot with bilingual examples (bi-16) is above zero-shot in reliability: {against}, with 95% bootstrap intervals over
items.

Measured {describe(results["environment"])}.
"""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--items", type=int, default=50, help="of the 200 test items")
    parser.add_argument("--dev", action="store_true", help="on the items for choosing")
    parser.add_argument("--decider", choices=tuple(COLUMNS), default="head")
    parser.add_argument("--output", type=Path, help="write the results there, and no section of docs/results.md")
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
    whole = set(options.directions) == set(DIRECTIONS) and set(options.arms) == set(ARMS)
    if options.output is None and (options.dev or not whole or set(options.kinds) != set(KINDS)):
        parser.error("this is a part of the measurement: name an --output for it")
    return options


def main() -> None:
    options = arguments()
    encoder = CachedEncoder(encoders.load("e5-small"), options.cache)
    groups = training_groups(encoder, options.training)
    chosen = fitted_decider(options.decider, groups, encoder.identity, cache=options.cache)
    with tempfile.TemporaryDirectory() as folder:
        asked = list(tasks(options, encoder, chosen, folder))
    log = Log(options.log, options.model)
    run(options, asked, log)
    report = summary(marks(asked, log), options.arms)
    for name in ("from_english", "to_english"):
        for measure, ways in report[name].items():
            for way, means in ways.items():
                print(f"{name:13} {measure:12} {way:7} {means}")
    settings = {
        "model": options.model.name,
        "items": options.items,
        "facts": len(mzsre.items()),
        "training": options.training,
        "decider": options.decider,
    }
    results = {"environment": environment(), **settings, **report, "paper_bloomz_560m": PAPER_BLOOMZ_560M}
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    else:
        publish("remake_mzsre", results, section(results))


if __name__ == "__main__":
    main()
