"""Requests in one batch, or with one prompt, never see each other's edits: each gets its own tokens, in float32.

The programs mix all opcodes, points, spans and gates.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from server.engine.edits import POINTS, Edit, Point, layers_at
from server.engine.operands import Operand, pack
from server.engine.spans import Span
from tests.server.engine.child import Request, Result, Run, run_engine
from tests.server.engine.programs import LAST, by_point, random_program, tensors_for
from tests.server.engine.test_parity import SHAPE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

LAYERS, HIDDEN, BLOCK = SHAPE["num_hidden_layers"], SHAPE["hidden_size"], 32
WIDTHS: dict[Point, int] = {**dict.fromkeys(POINTS, HIDDEN), "head_out": 256, "mlp_act": 192}
SHARED_PROMPT_TOKENS = 3 * BLOCK + 1
"""All but the last token can come from the cache: a prefill of one token."""
SHARED = 976
ENGINE: dict[str, Any] = {"max_model_len": 256, "max_num_seqs": 24, "block_size": BLOCK}
Operands = dict[str, tuple[Point, Operand]]


def programs() -> list[tuple[Edit, ...]]:
    dice = random.Random(3)
    return [by_point(random_program(dice, LAYERS, POINTS, strength=0.7)) for _ in range(24)]


def batch() -> list[Request]:
    """16 steered requests and 8 unsteered ones, with prompts of 10 to 59 tokens."""
    rng, every = np.random.default_rng(0), programs()
    chosen = [every[index] if index % 3 != 2 else () for index in range(24)]
    return [Request(rng.integers(3, 150, rng.integers(10, 60)).tolist(), edits, 64) for edits in chosen]


def shared() -> list[Request]:
    """Requests with one prompt, every other one unsteered."""
    prompt = np.random.default_rng(1).integers(3, 150, SHARED_PROMPT_TOKENS).tolist()
    every = programs()
    return [Request(prompt, every[index // 2 % len(every)] if index % 2 else (), 10) for index in range(SHARED)]


def rounds() -> list[list[Request]]:
    requests = shared()
    return [batch(), *(requests[start : start + 61] for start in range(0, SHARED, 61))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(**SHAPE)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def operands() -> Operands:
    return {
        f"{point}-{key}": (point, pack(tensors))
        for seed, (point, width) in enumerate(WIDTHS.items())
        for key, tensors in tensors_for(len(layers_at(point, LAYERS)), width, 1.0, seed).items()
    }


@pytest.fixture(scope="module")
def alone(model: Path, operands: Operands, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Each different request by itself, without prefix cache."""
    different = {key(request): request for request in (*batch(), *shared())}
    engine = {**ENGINE, "model": str(model), "enable_prefix_caching": False}
    run = run_engine(tmp_path_factory.mktemp("alone"), operands, [[each] for each in different.values()], engine)
    return {name: result for name, (result,) in zip(different, run.rounds, strict=True)}


def key(request: Request) -> str:
    return f"{request.prompt}{request.edits}"


def assert_as_alone(asked: list[list[Request]], run: Run, alone: dict[str, Result]) -> None:
    leaks = [
        request.edits
        for requests, results in zip(asked, run.rounds, strict=True)
        for request, result in zip(requests, results, strict=True)
        if not result.aborted and differs(result, alone[key(request)])
    ]
    assert leaks == []


def differs(result: Result, alone: Result) -> bool:
    if any(tokens != alone.tokens for tokens in (result.tokens, *result.others)):
        return True
    return bool(np.abs(np.subtract(result.logprobs, alone.logprobs)).max() > 1e-3)


def disturbed(requests: list[Request]) -> list[Request]:
    """Every fifth is aborted, in the queue or while it runs, and every seventh wants two choices."""
    return [
        request._replace(abort_after=1 + index % 23)
        if index % 5 == 0
        else request._replace(choices=2 if index % 7 == 3 else 1)
        for index, request in enumerate(requests)
    ]


def test_the_programs_really_differ(alone: dict[str, Result]) -> None:
    outputs = {tuple(alone[key(request)].tokens) for request in shared()}
    assert len(outputs) >= 16, "too many programs change nothing: the other tests would prove little"


def test_a_thousand_requests_in_mixed_batches_with_shared_prompts_change_nothing(
    model: Path, operands: Operands, alone: dict[str, Result], tmp_path: Path
) -> None:
    engine = {**ENGINE, "model": str(model), "enable_prefix_caching": True}
    run = run_engine(tmp_path, operands, rounds(), engine)
    assert sum(map(len, run.rounds)) == 1000
    assert_as_alone(rounds(), run, alone)
    assert all(result.cached == 3 * BLOCK for result in run.rounds[-1]), "equal requests must share the prompt's blocks"
    assert any(result.cached == 0 for result in run.rounds[1])


def test_preemption_and_small_chunks_change_nothing(
    model: Path, operands: Operands, alone: dict[str, Result], tmp_path: Path
) -> None:
    engine = {
        **ENGINE,
        "model": str(model),
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 40,
        "num_gpu_blocks_override": 14,
    }
    run = run_engine(tmp_path, operands, rounds(), engine)
    assert run.preemptions > 10, "nothing was preempted: this proves nothing"
    assert_as_alone(rounds(), run, alone)


def test_cancellations_and_several_choices_change_nothing(
    model: Path, operands: Operands, alone: dict[str, Result], tmp_path: Path
) -> None:
    engine = {
        **ENGINE,
        "model": str(model),
        "enable_prefix_caching": True,
        "max_num_batched_tokens": 40,
        "num_gpu_blocks_override": 14,
    }
    asked = [disturbed(each) for each in rounds()[:4]]
    run = run_engine(tmp_path, operands, asked, engine)
    every = [result for results in run.rounds for result in results]
    assert sum(result.aborted for result in every) > 20, "hardly any was aborted: this proves little"
    assert sum(len(result.others) for result in every) > 20
    assert run.preemptions > 0
    assert_as_alone(asked, run, alone)


def test_operands_that_had_to_make_room_come_back_as_they_were(
    model: Path, operands: Operands, alone: dict[str, Result], tmp_path: Path
) -> None:
    """Of all kinds: each round's push out those of the rounds before, of which the last ones come again."""
    requests = shared()[: 2 * len(programs())]
    asked = [requests[start : start + 6] for start in range(0, len(requests), 6)] * 2
    needed = [{edit.operand for request in each for edit in request.edits if edit.operand} for each in asked]
    most = max(sum(4 * len(operands[key][1].data) for key in keys) for keys in needed)
    engine = {**ENGINE, "model": str(model), "enable_prefix_caching": False}
    run = run_engine(tmp_path, operands, asked, engine, config={"bank_bytes": int(1.1 * most)}, reload=True)
    assert run.uploads > 1.5 * len(set().union(*needed)), "hardly any had to make room: this proves little"
    assert_as_alone(asked, run, alone)


def test_edits_behind_the_prompt_share_it_with_unsteered_requests(
    model: Path, operands: Operands, tmp_path: Path
) -> None:
    prompt, everywhere = shared()[0].prompt, tuple(range(LAYERS))

    def add(span: Span) -> tuple[Edit, ...]:
        return (Edit("add", "resid_post-vector-0", everywhere, 1.0, span),)

    chosen = ((), add(Span(prompt=False)), add(LAST), add(Span()), ())
    engine = {**ENGINE, "model": str(model), "enable_prefix_caching": True}
    run = run_engine(tmp_path, operands, [[Request(prompt, edits, 2)] for edits in chosen], engine)
    assert [result.cached for (result,) in run.rounds] == [0, 3 * BLOCK, 3 * BLOCK, 0, 3 * BLOCK]
