"""Kills 300 processes in the store, and writes down where they died: the program that the tests run, with a given seed.

    python -m benchmarks.store_crashes

After every death the store must be where the acknowledged operations leave it, or one further; the first that isn't
ends the run with an error, and nothing is written. The same seed gives the same operations and points.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from server.version import code_version

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "store_crashes.json"
MANIFEST: dict[str, Any] = {
    "schema_version": 1,
    "kind": "steering_vector",
    "model": {"architecture": "LlamaForCausalLM", "hidden_size": 8, "num_layers": 4},
    "sites": [
        {
            "point": "resid_post",
            "layer": 2,
            "file": "vectors.safetensors",
            "tensor": "layer.2",
            "shape": [8],
            "dtype": "F32",
        }
    ],
    "default_strength": 1.0,
    "provenance": {"method": "constant"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=20_261_128)
    parser.add_argument("--deaths", type=int, default=300)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    program = "tests.steering_store.crashes"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", program, folder, json.dumps(MANIFEST)]
        done = subprocess.run(
            [*command, str(arguments.seed), str(arguments.deaths)], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
    told = json.loads(done.stdout)
    operations, points = Counter[str](), Counter[str]()
    for place, count in told.pop("where").items():
        operation, _, point = place.partition(": ")
        operations[operation] += count
        points[point] += count
    found = {"deaths_by_operation": dict(operations.most_common()), "deaths_by_point": dict(points.most_common())}
    results = {"environment": environment(), "code_version": code_version(), **told, **found}
    arguments.output.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
