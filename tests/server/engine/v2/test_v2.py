"""vLLM's V2 model runner against its V1 runner: the same requests, the same tokens, log-probabilities and counts.

V2 runs here without a GPU, its kernels in Triton's interpreter; see sitecustomize.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from server.engine.edits import Condition, Edit, Point, Program
from server.engine.operands import Operand, pack
from server.engine.spans import Span
from tests.server.engine.child import Request, Result, Run, run_engine
from tests.server.engine.test_parity import SHAPE, TOLERANCE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

LAYERS = SHAPE["num_hidden_layers"]
BLOCK, SHARED_PROMPT_TOKENS, NEW_TOKENS = 32, 70, 40
ENGINE: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 8,
    "block_size": BLOCK,
    # Chunks shorter than the prompts, one-token chunks among them.
    "max_num_batched_tokens": 33,
    "enable_prefix_caching": True,
}
Operands = dict[str, tuple[Point, Operand]]
V1 = {"VLLM_USE_V2_MODEL_RUNNER": "0"}


def v2(seams: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": path,
        "POLYHELM_TEST_SEAMS": str(seams),
    }


def programs() -> list[tuple[Edit, ...]]:
    everywhere, middle = tuple(range(LAYERS)), (LAYERS // 2,)
    last_prompt_token = Span(prompt=False, generation=False, prompt_positions=(-1,))
    window = Span(prompt=False, generation=False, prompt_window=(4, 40), generation_window=(3, 15))

    def gated(above: bool) -> tuple[Edit, ...]:
        condition = Condition("cosine", 0.0, above, "sequence")
        return Edit("gate", "w", middle, condition=condition), Edit("add", "v", middle, 3.0, gate=0)

    return [
        (),
        (Edit("add", "v", middle, 3.0),),
        (Edit("add", "v", everywhere, 0.5, Span(prompt=False)),),
        (Edit("add_norm", "w", middle, 0.4), Edit("add_norm", "v", (0, LAYERS - 1), -0.2)),
        (Edit("add", "w", middle, 4.0, last_prompt_token),),
        (Edit("add", "w", everywhere, 0.5, window),),
        (Edit("add", "v", everywhere, 0.3, Span(generation=False)), Edit("add", "w", middle, -2.0, Span(prompt=False))),
        gated(True),
        gated(False),
    ]


def rounds() -> list[list[Request]]:
    """Each program with a prompt of its own, in one batch; then all with one prompt, so that blocks are shared."""
    rng = np.random.default_rng(0)
    vocabulary = SHAPE["vocab_size"]
    own = [
        Request(rng.integers(0, vocabulary, 20 + 7 * index).tolist(), edits, NEW_TOKENS, prompt_logprobs=True)
        for index, edits in enumerate(programs())
    ]
    prompt = rng.integers(0, vocabulary, SHARED_PROMPT_TOKENS).tolist()
    shared = [Request(prompt, edits, NEW_TOKENS) for edits in programs()]
    return [own, shared, shared]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("tiny") / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def operands() -> Operands:
    rng = np.random.default_rng(1)
    vectors = {key: rng.standard_normal((LAYERS, SHAPE["hidden_size"])).astype(np.float32) for key in "vw"}
    return {
        key: ("resid_post", pack({layer: {"vector": each} for layer, each in enumerate(by_layer)}))
        for key, by_layer in vectors.items()
    }


@pytest.fixture(scope="module")
def on_v1(model: Path, operands: Operands, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("v1")
    return run_engine(folder, operands, rounds(), {**ENGINE, "model": str(model)}, env=V1)


def run_on_v2(folder: Path, model: Path, operands: Operands, **engine: Any) -> Run:
    seams = folder / "seams.json"
    run = run_engine(folder, operands, rounds(), {**ENGINE, "model": str(model), **engine}, env=v2(seams))
    assert json.loads(seams.read_text()) == {"v1": [], "v2": ["execute_model", "prepare_inputs"]}
    return run


def assert_same(found: Run, expected: Run) -> None:
    for requests, many, others in zip(rounds(), found.rounds, expected.rounds, strict=True):
        for request, result, other in zip(requests, many, others, strict=True):
            assert result.tokens == other.tokens
            np.testing.assert_allclose(result.logprobs, other.logprobs, atol=TOLERANCE)
            np.testing.assert_allclose(result.prompt_logprobs, other.prompt_logprobs, atol=TOLERANCE)
            assert [any(each) for each in result.touched] == [any(each) for each in other.touched]
            check_counts(request, result)
            check_counts(request, other)


def check_counts(request: Request, result: Result) -> None:
    """The op edits what the prefix cache didn't hold; a token that a preempted request runs again counts once."""
    prompt_len = len(request.prompt)
    ran = prompt_len + NEW_TOKENS - 1
    everything = zip(request.edits, Program(request.edits).intervals(prompt_len), result.touched, strict=True)
    for edit, intervals, touched in everything:
        tokens = sum(max(0, min(end, ran) - max(start, result.cached)) for start, end in intervals)
        closed = edit.gate is not None and not any(touched)
        assert touched == [0 if closed else tokens] * len(edit.layers)


def test_steered_requests_differ(on_v1: Run) -> None:
    # Of the two gates one is closed, which leaves the request as it is.
    assert len({tuple(result.tokens) for result in on_v1.rounds[1]}) >= len(programs()) - 2
    opened, closed = ([any(each) for each in result.touched] for result in on_v1.rounds[1][-2:])
    assert {tuple(opened), tuple(closed)} == {(True, True), (True, False)}
    assert any(result.cached for result in on_v1.rounds[2])


def test_mixed_programs_equal_v1(model: Path, operands: Operands, on_v1: Run, tmp_path: Path) -> None:
    run = run_on_v2(tmp_path, model, operands)
    assert_same(run, on_v1)
    cached = [[result.cached for result in results] for results in run.rounds]
    assert cached == [[result.cached for result in results] for results in on_v1.rounds]


def test_preempted_programs_equal_v1(model: Path, operands: Operands, on_v1: Run, tmp_path: Path) -> None:
    run = run_on_v2(tmp_path, model, operands, num_gpu_blocks_override=8)
    assert run.preemptions > 3, "nothing was preempted: this proves nothing"
    assert_same(run, on_v1)
