"""Requests in one batch, or with one prompt, never see each other's edits: each gets its own tokens, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.engine.edits import Edit, Span
from tests.server.engine.child import Request, Result, Run, run_engine

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

LAYERS, HIDDEN, BLOCK = 30, 576, 32
SHARED_PROMPT_TOKENS = 90
ENGINE: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 24, "block_size": BLOCK}


def programs() -> list[tuple[Edit, ...]]:
    """12 different ones: opcodes, layers, strengths, spans, several edits."""
    everywhere = tuple(range(LAYERS))
    last = Span(prompt=False, generation=False, prompt_positions=(-1,))
    return [
        (Edit("add", "a", (10,), 2.0),),
        (Edit("add", "a", (10,), -2.0),),
        (Edit("add", "b", (10,), 2.0),),
        (Edit("add", "a", (20,), 2.0),),
        (Edit("add", "a", everywhere, 0.2),),
        (Edit("add", "b", everywhere, 0.2, Span(prompt=False)),),
        (Edit("add", "b", (5, 6, 7), 2.0, last),),
        (Edit("add_norm", "a", (12,), 0.3),),
        (Edit("add_norm", "b", (12,), 0.3, Span(generation=False)),),
        (Edit("add", "a", (10,), 1.0), Edit("add_norm", "b", (10, 11), 0.2)),
        (Edit("add", "a", everywhere, 0.2, Span(prompt=False, generation=False, generation_window=(4, 12))),),
        (Edit("add", "b", (15,), 3.0, Span(exclude_prompt_window=(0, 8))),),
    ]


def batch() -> list[Request]:
    """16 steered requests with the 12 programs, and 8 unsteered ones, with prompts of 10 to 59 tokens."""
    rng = np.random.default_rng(0)
    every = programs()
    chosen = [every[index % 12] if index % 3 != 2 else () for index in range(24)]
    steered = [index for index in range(24) if chosen[index]]
    for number, index in enumerate(steered):
        chosen[index] = every[number % 12]
    return [Request(rng.integers(3, 40000, rng.integers(10, 60)).tolist(), edits, 24) for edits in chosen]


def shared() -> list[Request]:
    """200 requests with one prompt, every other one unsteered."""
    prompt = np.random.default_rng(1).integers(3, 40000, SHARED_PROMPT_TOKENS).tolist()
    every = programs()
    return [Request(prompt, every[index // 2 % 12] if index % 2 else (), 12) for index in range(200)]


def rounds() -> list[list[Request]]:
    requests = shared()
    return [batch(), *(requests[start : start + 20] for start in range(0, 200, 20))]


@pytest.fixture(scope="module")
def vectors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {key: (2 * rng.standard_normal((LAYERS, HIDDEN))).astype(np.float32) for key in "ab"}


@pytest.fixture(scope="module")
def alone(smollm2: Path, vectors: dict[str, np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Each different request by itself, without prefix cache."""
    different = {key(request): request for request in (*batch(), *shared())}
    engine = {**ENGINE, "model": str(smollm2), "enable_prefix_caching": False}
    run = run_engine(tmp_path_factory.mktemp("alone"), vectors, [[each] for each in different.values()], engine)
    return {name: result for name, (result,) in zip(different, run.rounds, strict=True)}


def key(request: Request) -> str:
    return f"{request.prompt}{request.edits}"


def assert_as_alone(run: Run, alone: dict[str, Result]) -> None:
    for requests, results in zip(rounds(), run.rounds, strict=True):
        for request, result in zip(requests, results, strict=True):
            expected = alone[key(request)]
            assert result.tokens == expected.tokens
            np.testing.assert_allclose(result.logprobs, expected.logprobs, atol=1e-3)


def test_the_programs_really_differ(alone: dict[str, Result]) -> None:
    outputs = {tuple(alone[key(request)].tokens) for request in shared()}
    assert len(outputs) >= 10, "too many programs change nothing: the other tests would prove little"


def test_mixed_batches_and_shared_prompts_change_nothing(
    smollm2: Path, vectors: dict[str, np.ndarray], alone: dict[str, Result], tmp_path: Path
) -> None:
    engine = {**ENGINE, "model": str(smollm2), "enable_prefix_caching": True}
    run = run_engine(tmp_path, vectors, rounds(), engine)
    assert_as_alone(run, alone)
    first, last = run.rounds[1], run.rounds[-1]
    whole_blocks = SHARED_PROMPT_TOKENS // BLOCK * BLOCK
    assert all(result.cached == whole_blocks for result in last), "equal requests must share the prompt's blocks"
    assert any(result.cached == 0 for result in first)


def test_generation_only_programs_share_the_prompt_with_unsteered_requests(
    smollm2: Path, vectors: dict[str, np.ndarray], tmp_path: Path
) -> None:
    prompt = shared()[0].prompt
    generation_only, last_token, everything = programs()[5], programs()[6], programs()[4]
    requests = [Request(prompt, edits, 2) for edits in ((), generation_only, last_token, everything, ())]
    engine = {**ENGINE, "model": str(smollm2), "enable_prefix_caching": True}
    run = run_engine(tmp_path, vectors, [[each] for each in requests], engine)
    whole_blocks = SHARED_PROMPT_TOKENS // BLOCK * BLOCK
    assert [result.cached for (result,) in run.rounds] == [0, whole_blocks, whole_blocks, 0, whole_blocks]


def test_preemption_and_small_chunks_change_nothing(
    smollm2: Path, vectors: dict[str, np.ndarray], alone: dict[str, Result], tmp_path: Path
) -> None:
    engine = {
        **ENGINE,
        "model": str(smollm2),
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": 14,
    }
    run = run_engine(tmp_path, vectors, rounds(), engine)
    assert run.preemptions > 10, "nothing was preempted: this proves nothing"
    assert_as_alone(run, alone)
    for results in run.rounds:
        for result in results:
            for touched in result.touched:
                assert len(set(touched) - {0}) <= 1
