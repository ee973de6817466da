"""Runs kernel_cases.py in Triton's interpreter, and compiles the kernels as on a GPU, each in a process of its own."""

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


def test_kernels_equal_the_reference_in_the_interpreter(tmp_path: Path) -> None:
    # Without the conftests, which convert models.
    output = run(tmp_path, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(CASES), interpret=True)
    summary = output.strip().splitlines()[-1]
    assert re.fullmatch(r"\d{3,} passed in .*", summary), summary


@pytest.mark.parametrize("capability", (80, 90))
def test_kernels_compile_for_a_gpu(tmp_path: Path, capability: int) -> None:
    """The interpreter accepts what the compiler refuses. Compiling needs no GPU."""
    script = str(Path(__file__).with_name("compile_kernels.py"))
    assert run(tmp_path, "-W", "ignore", script, str(capability), interpret=False).count("registers") == 6
