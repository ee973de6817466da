"""Kill -9 at random points: nothing acknowledged is lost, nothing deleted is found."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
DEATHS = int(os.environ.get("POLYHELM_TEST_DEATHS", "300"))


def test_no_death_loses_what_was_acknowledged_or_leaves_an_index_unlike_the_facts(tmp_path: Path) -> None:
    seed = random.randrange(1 << 32)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kb.crashes", str(tmp_path), str(seed), str(DEATHS)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    told = json.loads(done.stdout)
    assert sum(told["where"].values()) == DEATHS
    # What a run must have met to prove anything: each operation killed, and each kind of point.
    operations, points = (set(part) for part in zip(*(place.split(": ") for place in told["where"]), strict=True))
    assert {"upsert", "delete", "delete_of", "snapshot", "rebuild"} <= operations
    assert {"BEGIN", "INSERT", "UPDATE", "COMMIT", "write", "fsync", "replace", "acknowledge"} <= points
    assert told["from_snapshot"] > 0
