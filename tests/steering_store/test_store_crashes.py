"""Processes killed at 300 random points of random histories; `crashes.py` is the program that does it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DEATHS = 300


def test_no_death_loses_what_was_acknowledged_or_leaves_anything_half_done(
    tmp_path: Path, manifest: dict[str, Any]
) -> None:
    seed = random.randrange(1 << 32)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.steering_store.crashes",
            str(tmp_path),
            json.dumps(manifest),
            str(seed),
            str(DEATHS),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    told = json.loads(done.stdout)
    assert sum(told["where"].values()) == DEATHS
    # What a run must have met to prove anything: each operation killed, and each kind of point.
    operations, points = (set(part) for part in zip(*(place.split(": ") for place in told["where"]), strict=True))
    assert {"publish", "publish_pair", "publish_preset", "set_alias", "yank", "delete_version", "collect"} <= operations
    assert {"write", "fsync", "replace", "unlink", "BEGIN", "INSERT", "DELETE", "COMMIT", "acknowledge"} <= points
    assert min(told["versions"].values()) > 10
