"""The Triton kernels in vLLM's V2 runner: all opcodes, points and gates in one batch, as on V1 with the CPU's op.

Both the runner's kernels and ours run in Triton's interpreter; see sitecustomize.py.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engine.edits import POINTS, Edit
from tests.server.engine.child import Request, Run, run_engine
from tests.server.engine.programs import by_point, random_program
from tests.server.engine.test_isolation import LAYERS, Operands, disturbed
from tests.server.engine.test_isolation import model as model
from tests.server.engine.test_isolation import operands as operands
from tests.server.engine.test_parity import TOLERANCE
from tests.server.engine.v2.test_v2 import V1, v2

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

BLOCK, NEW_TOKENS = 32, 5
ENGINE: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "block_size": BLOCK,
    "max_num_batched_tokens": 40,
    "enable_prefix_caching": True,
}


def programs() -> list[tuple[Edit, ...]]:
    dice = random.Random(5)
    return [(), *(by_point(random_program(dice, LAYERS, POINTS, strength=0.7)) for _ in range(11))]


def rounds() -> list[list[Request]]:
    """Prompts of their own, in chunks; then one prompt for all, so that blocks are shared; then the first ones again,
    some of them aborted. Two choices need a sampling kernel of vLLM that the interpreter can't run.
    """
    rng = np.random.default_rng(0)
    own = [
        Request(rng.integers(3, 150, 6 + 3 * index).tolist(), edits, NEW_TOKENS)
        for index, edits in enumerate(programs())
    ]
    shared = rng.integers(3, 150, BLOCK + 1).tolist()
    return [
        own,
        [Request(shared, edits, NEW_TOKENS) for edits in programs()],
        [each._replace(choices=1) for each in disturbed(own)],
    ]


def test_kernels_equal_the_op_on_a_cpu(model: Path, operands: Operands, tmp_path: Path) -> None:
    runs: dict[str, Run] = {}
    for name, env, op in (("V1", V1, "torch"), ("V2", v2(tmp_path / "seams.json"), "triton")):
        folder = tmp_path / name
        folder.mkdir()
        engine = {**ENGINE, "model": str(model)}
        runs[name] = run_engine(folder, operands, rounds(), engine, env=env, config={"op": op})
        assert runs[name].runner == name
    different = {tuple(result.tokens) for result in runs["V1"].rounds[1]}
    assert len(different) >= 7, "too many programs change nothing: this would prove little"
    assert all(any(result.aborted for result in run.rounds[2]) for run in runs.values())
    for ours, others in zip(runs["V2"].rounds, runs["V1"].rounds, strict=True):
        for result, other in zip(ours, others, strict=True):
            if result.aborted or other.aborted:
                continue
            assert result.tokens == other.tokens
            np.testing.assert_allclose(result.logprobs, other.logprobs, atol=TOLERANCE)
            assert (result.touched, result.cached) == (other.touched, other.cached)
