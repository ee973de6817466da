"""What a request with `knowledge` costs before it is generated: encode, search and decide, by size of the collection.

The paper judges every fact with a cross-encoder, so that its cost grows with the knowledge base: from 10 s for the
whole test with 10 facts to 272 s with 800. Facts here have made-up names, the encoder and the decider are real, and the
vectors of the facts are random, as time doesn't depend on them. Writes results/remake_latency.json.

    .venv/bin/python benchmarks/remake_latency.py [--scope FOLDER]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment

from kb import encoders
from kb.facts import FactDraft
from kb.knowledge_base import KnowledgeBase
from kb.languages import identified
from kb.lookup import find
from kb.scope import Decider, Text
from kb.scope.storage import default, load

RESULTS = Path(__file__).with_name("results") / "remake_latency.json"
SIZES = (1_000, 10_000, 100_000)
BATCH = 10_000
STEPS = ("encode", "search_and_decide", "all")


def fill(base: KnowledgeBase, encoder: encoders.Encoder, size: int, random: np.random.Generator) -> Any:
    collection, _ = base.create(f"facts-{size}", encoder.identity, "keep")
    for start in range(0, size, BATCH):
        numbers = range(start, min(start + BATCH, size))
        drafts = [
            FactDraft(
                id=str(n), question=f"Who designed the bridge Number{n} in Town{n % 997}?", answer="-", language="en"
            )
            for n in numbers
        ]
        rows = random.standard_normal((len(drafts), encoder.identity.dimension)).astype(np.float32)
        collection.upsert(drafts, rows / np.linalg.norm(rows, axis=1, keepdims=True))
    return collection


def measure(collection: Any, encoder: encoders.Encoder, decider: Decider, queries: int) -> dict[str, dict[str, float]]:
    """Milliseconds, median and 99th percentile, per step."""
    taken: dict[str, list[float]] = {name: [] for name in STEPS}
    for number in range(queries + 5):
        question = f"Wer hat die Brücke Nummer {number} in der Stadt {number % 89} entworfen?"
        start = time.perf_counter()
        (vector,) = encoder.encode_queries([question])
        encoded = time.perf_counter()
        find(collection, decider, Text(question, identified(question).language, vector))
        end = time.perf_counter()
        if number >= 5:
            for name, seconds in zip(STEPS, (encoded - start, end - encoded, end - start), strict=True):
                taken[name].append(1000 * seconds)
    return {
        name: {"p50": round(float(np.quantile(values, 0.5)), 2), "p99": round(float(np.quantile(values, 0.99)), 2)}
        for name, values in taken.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scope", type=Path, help="a decider's folder; that of polyhelm unless given")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--queries", type=int, default=300)
    options = parser.parse_args()
    encoder = encoders.load("e5-small")
    decider = load(options.scope) if options.scope else default()
    with tempfile.TemporaryDirectory() as folder:
        base = KnowledgeBase.open(folder)
        random = np.random.default_rng(0)
        report = {
            str(size): measure(fill(base, encoder, size, random), encoder, decider, options.queries)
            for size in options.sizes
        }
    content = {"environment": environment(), "decider": decider.name, "queries": options.queries, "ms": report}
    print(json.dumps(content, indent=1))
    RESULTS.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
