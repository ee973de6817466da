"""Runs kernel_cases.py with each kernel, and compiles Triton's as on a GPU, each in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
CASES = Path(__file__).with_name("kernel_cases.py")


def run(tmp_path: Path, *args: str, interpret: bool) -> str:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["TRITON_INTERPRET"] = "1" if interpret else "0"
    child = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=580, cwd=ROOT, env=environment
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-3000:]
    return child.stdout


@pytest.mark.parametrize("interpret", (True, False), ids=("Triton", "CPU"))
def test_kernels_equal_the_reference(tmp_path: Path, interpret: bool) -> None:
    # Without the conftests, which convert models.
    args = ("-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(CASES))
    summary = run(tmp_path, *args, interpret=interpret).strip().splitlines()[-1]
    assert re.fullmatch(r"\d{3,} passed(, 1 skipped)? in .*", summary), summary


@pytest.mark.parametrize("capability", (80, 90))
def test_kernels_compile_for_a_gpu(tmp_path: Path, capability: int) -> None:
    """The interpreter accepts what the compiler refuses. Compiling needs no GPU."""
    script = str(Path(__file__).with_name("compile_kernels.py"))
    assert run(tmp_path, "-W", "ignore", script, str(capability), interpret=False).count("registers") == 6
