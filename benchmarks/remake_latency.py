"""What a request with `knowledge` costs before it is generated: encode, search and decide, by size of the collection.

The paper judges every fact with a cross-encoder, so that its cost grows with the knowledge base: from 10 s for the
whole test with 10 facts to 272 s with 800. `all` is the server's own path, from the field to the prompt, one request
at a time; the other steps are the same calls one by one. Facts have made-up names, the encoder and the deciders are
real, and the vectors of the facts are random, as time doesn't depend on them; for the same reason the head is fitted
on few questions. Writes results/remake_latency.json and the section of docs/remake.md.

    .venv/bin/python benchmarks/remake_latency.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe, environment

from kb import encoders
from kb.facts import FactDraft
from kb.knowledge_base import KnowledgeBase
from kb.languages import identified
from kb.lookup import CANDIDATES
from kb.scope import Decider, Text
from kb.scope.pairs import Encoded, Group
from kb.scope.storage import default
from kb.scope.training import fit_head
from server.api.knowledge_schema import Knowledge
from server.encoding import BatchedEncoder
from server.knowledge import Adviser

RESULTS = Path(__file__).with_name("results") / "remake_latency.json"
PAGE = Path(__file__).parent.parent / "docs" / "remake.md"
BEGIN, END = "<!-- remake_latency -->\n", "<!-- end of remake_latency -->\n"
SIZES = (1_000, 10_000, 100_000)
BATCH = 10_000
WARM = 5
STEPS = ("encode", "search", "decide", "all", "all_in_one_percent")
GOALS = {"p50_ms": 40, "search_p50_ms": 10, "growth": 1.5}


def asked(number: int) -> str:
    return f"Wer hat die Brücke Nummer {number} in der Stadt {number % 89} entworfen?"


def fill(base: KnowledgeBase, encoder: encoders.Encoder, size: int, random: np.random.Generator) -> None:
    """One fact in a hundred is in another language than the rest."""
    collection, _ = base.create(f"facts-{size}", encoder.identity, "keep")
    for start in range(0, size, BATCH):
        drafts = [
            FactDraft(
                id=str(n),
                question=f"Who designed the bridge Number{n} in Town{n % 997}?",
                answer="-",
                language="en" if n % 100 else "sw",
            )
            for n in range(start, min(start + BATCH, size))
        ]
        rows = random.standard_normal((len(drafts), encoder.identity.dimension)).astype(np.float32)
        collection.upsert(drafts, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    # Unasked, the index would be kept in the background, while times are taken.
    collection.snapshot()


def head(encoder: encoders.Encoder) -> Decider:
    groups = [
        Group(((f"Who designed the bridge Number{n} in Town{n % 97}?", "en"), (asked(n), "de"))) for n in range(120)
    ]
    rows = encoder.encode_queries([text for group in groups for text, _ in group.questions])
    vectors = list(rows.reshape(len(groups), 2, -1))
    return fit_head(Encoded(groups, vectors), encoder.identity, false_fires=0.02, report=lambda text: None)


class Clock:
    """Milliseconds by step."""

    def __init__(self) -> None:
        self.taken: dict[str, list[float]] = {step: [] for step in STEPS}

    @contextmanager
    def of(self, step: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.taken[step].append(1000 * (time.perf_counter() - start))

    def quantiles(self) -> dict[str, dict[str, float]]:
        """Median and 99th percentile, without those that warmed up."""
        return {
            step: {f"p{q}": round(float(np.percentile(times[WARM:], q)), 2) for q in (50, 99)}
            for step, times in self.taken.items()
        }


class Server:
    """What answers a request with `knowledge`, with one decider and one collection."""

    def __init__(self, base: KnowledgeBase, encoder: encoders.Encoder, decider: Decider, size: int) -> None:
        self.clock = Clock()
        self._encoder, self._decider, self._name = encoder, decider, f"facts-{size}"
        self._collection = base.collection(self._name)
        self._adviser = Adviser(base, BatchedEncoder(encoder), decider)

    async def ask(self, question: str) -> None:
        with self.clock.of("encode"):
            (vector,) = self._encoder.encode_queries([question])
        text = Text(question, identified(question).language, vector)
        with self.clock.of("search"):
            facts = [hit.fact for hit in self._collection.search(vector[None], CANDIDATES)[0]]
            rows = self._collection.vectors(facts)
        candidates = [Text(f.key, f.language, row) for f, row in zip(facts, rows, strict=True) if row is not None]
        with self.clock.of("decide"):
            self._decider.probabilities(text, candidates)
        with self.clock.of("all"):
            await self._adviser.advise(Knowledge(collection=self._name), question)
        with self.clock.of("all_in_one_percent"):
            await self._adviser.advise(Knowledge(collection=self._name, edit_language="sw"), question)


async def ask_in_turns(servers: list[Server], queries: int) -> None:
    """One question to each after the other, so that whatever else runs on the machine slows all of them alike."""
    for number in range(queries + WARM):
        for server in servers:
            await server.ask(asked(number))


def section(results: dict[str, Any]) -> str:
    lines = []
    for decider, sizes in results["ms"].items():
        for size, steps in sizes.items():
            cells = " | ".join(f"{steps[step]['p50']} / {steps[step]['p99']}" for step in STEPS)
            lines.append(f"| `{decider}` | {int(size):,} | {cells} |")
    growth = " and ".join(f"{times} times (`{decider}`)" for decider, times in results["growth"].items())
    few, *_, many = sorted(map(int, next(iter(results["ms"].values()))))
    goals = results["goals"]
    return f"""Before anything is generated a request takes so long, in ms, p50 / p99. *All* is the server's own path,
one request at a time; *1%* is the same with an `edit_language` that one fact in a hundred has. Goals for p50: all
{goals["p50_ms"]}, the search {goals["search_p50_ms"]}.

| decider | facts | encode the question | search | decide | all | all, 1% |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}

From {few:,} to {many:,} facts all of it grows by {growth}; the goal is {goals["growth"]}. The paper's cross-encoder,
which reads every fact, took 10 s for its whole test with 10 facts and 272 s with 800.

Measured {describe(results["environment"])}; load of the machine before and after
{" and ".join(map(str, results["load"]))}. [Script](../benchmarks/remake_latency.py).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="where to put the files; by default the system's temporary folder")
    parser.add_argument("--output", type=Path, help="write the results there, and leave docs/remake.md alone")
    options = parser.parse_args()
    encoder = encoders.load("e5-small")
    deciders = {"threshold": default(), "head": head(encoder)}
    load = [round(os.getloadavg()[0], 1)]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base = KnowledgeBase.open(folder)
        random = np.random.default_rng(0)
        for size in options.sizes:
            fill(base, encoder, size, random)
        servers = {
            (name, size): Server(base, encoder, decider, size)
            for name, decider in deciders.items()
            for size in options.sizes
        }
        asyncio.run(ask_in_turns(list(servers.values()), options.queries))
    load.append(round(os.getloadavg()[0], 1))
    report: dict[str, dict[str, Any]] = {name: {} for name in deciders}
    for (name, size), server in servers.items():
        report[name][str(size)] = server.clock.quantiles()
    few, many = str(min(options.sizes)), str(max(options.sizes))
    growth = {name: round(sizes[many]["all"]["p50"] / sizes[few]["all"]["p50"], 2) for name, sizes in report.items()}
    results = {"environment": environment(), "load": load, "queries": options.queries, "goals": GOALS}
    results |= {"growth": growth, "ms": report}
    print(json.dumps(results, indent=1))
    (options.output or RESULTS).write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    if not options.output:
        before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
        PAGE.write_text(before + BEGIN + section(results) + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
