"""Processes killed at random points of random histories; `crashes.py` is the program that does it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("kind", "deaths"), [("local", 300), ("remote", 60)])
def test_no_death_loses_what_was_acknowledged_or_leaves_anything_half_done(
    tmp_path: Path, manifest: dict[str, Any], kind: str, deaths: int
) -> None:
    seed = random.randrange(1 << 32)
    program = [sys.executable, "-m", "tests.steering_store.crashes"]
    done = subprocess.run(
        [*program, str(tmp_path), json.dumps(manifest), str(seed), str(deaths), kind],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"seed {seed}\n{done.stderr}"
    told = json.loads(done.stdout)
    assert sum(told["where"].values()) == deaths
    # What a run must have met to prove anything: operations killed, and kinds of points.
    operations, points = (set(part) for part in zip(*(place.split(": ") for place in told["where"]), strict=True))
    if kind == "local":
        assert {"publish", "publish_pair", "publish_preset", "set_alias"} <= operations
        assert {"yank", "delete_version", "collect"} <= operations
        assert {"write", "replace", "BEGIN", "INSERT", "DELETE", "COMMIT", "acknowledge"} <= points
        assert min(told["versions"].values()) > 10
    else:
        assert {"publish", "set_alias"} <= operations
        assert {"link", "INSERT", "COMMIT"} <= points
    assert {"fsync", "unlink"} <= points
