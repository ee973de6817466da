"""The engine against transformers with forward hooks, in float32: the same log-probabilities, token by token.

Every opcode at every point and span, in one batch, then random programs that mix them; prompts in chunks.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Mapping, Sequence, Set
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from server.engine.capture import CaptureSpec
from server.engine.edits import POINTS, Condition, Edit, Point, Program, layers_at
from server.engine.operands import pack
from server.engine.spans import Span
from tests.server.engine.child import Request, Result, run_engine
from tests.server.engine.hooks import Tensors, activations, log_probabilities
from tests.server.engine.programs import FUNCTIONS, LAST, by_point, random_program, tensors_for

pytestmark = [pytest.mark.engine, pytest.mark.timeout(1000)]

TOLERANCE = 2e-3
PROMPT_TOKENS, NEW_TOKENS = 21, 16
SHAPE = {
    "vocab_size": 160,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
}
NO_HEAD_DIM = {key: value for key, value in SHAPE.items() if key != "head_dim"} | {"num_attention_heads": 2}
"""For configurations that know no head size of its own."""
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
TINY = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE | {"tie_word_embeddings": True}, **SLIDING),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SHAPE, **SLIDING),
    "olmo2": lambda: transformers.Olmo2Config(**NO_HEAD_DIM),
    # Its layers return a pair with None.
    "gemma4": lambda: transformers.Gemma4TextConfig(
        **SHAPE, **SLIDING, global_head_dim=SHAPE["head_dim"], hidden_size_per_layer_input=0
    ),
    "granite": lambda: transformers.GraniteConfig(**NO_HEAD_DIM, attention_multiplier=0.125),
}
BELOW = "below"
"""Of a gate and its twin, with one prompt, one is open wherever the other is closed."""
SEED = int(os.environ.get("PARITY_SEED", "0"))
"""Of the random programs. Another one tries others."""
UNDECIDED = 3e-5
"""Nearer to a threshold, as a cosine, the engine's rounding may fall on its other side."""
SPANS = {"all": Span(), "last": LAST, "window": Span(False, False, prompt_window=(4, 9), generation_window=(3, 12))}


def programs(point: Point, layers: int) -> dict[str, tuple[Edit, ...]]:
    """Each opcode, function and gate at one point, under each span."""
    everywhere = layers_at(point, layers)
    middle = (everywhere[len(everywhere) // 2],)
    made: dict[str, tuple[Edit, ...]] = {}

    def every_span(
        name: str, opcode: str, operand: str | None, where: tuple[int, ...], strength: float, **more
    ) -> None:
        for span_name, span in SPANS.items():
            made[f"{name} {span_name}"] = (Edit(opcode, operand, where, strength, span, point, **more),)

    every_span("add", "add", f"{point}-vector-0", everywhere, 0.7)
    every_span("add_norm", "add_norm", f"{point}-vector-1", everywhere, 0.4)
    every_span("scale", "scale", f"{point}-mask-0", everywhere, 1.5)
    every_span("map", "map", f"{point}-matrix-0", middle, 0.8)
    every_span("factored map", "map", f"{point}-factors-0", everywhere, 0.8)
    every_span("set", "set", f"{point}-vector-0", middle, 1.0)
    for index, function in enumerate(FUNCTIONS):
        every_span(f"rank {index}", "rank", f"{point}-rank-{index % 2}", everywhere, 0.8, function=function)
    for span_name, span in SPANS.items():
        add = Edit("add", f"{point}-vector-0", everywhere, 1.5, span, point)
        made[f"renorm {span_name}"] = (add, Edit("renorm", None, everywhere, 1.0, span, point))
        for scope, readout, above in product(("token", "sequence"), ("cosine", "dot"), (True, False)):
            decides = everywhere if scope == "token" else middle
            # What is decided for the sequence at its last prompt token reaches only layers behind, there.
            acts = everywhere[len(everywhere) // 2 :] if (scope, span_name) == ("sequence", "last") else everywhere
            condition = Condition(readout, 0.0, above, scope)
            made[f"{scope} {readout} gate {span_name} {'above' if above else BELOW}"] = (
                Edit("gate", f"{point}-vector-1", decides, 1.0, point=point, condition=condition),
                Edit("add", f"{point}-vector-0", acts, 1.5, span, point, gate=0),
            )
    return made


def check(
    model: torch.nn.Module,
    folder: Path,
    job: Path,
    random_programs: int,
    points: Sequence[Point] = POINTS,
    env: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    engine_args: Mapping[str, Any] | None = None,
    may_rest: Set[str] = frozenset(),
) -> None:
    layers, vocabulary = model.config.num_hidden_layers, min(model.config.vocab_size, 5000)
    rng = np.random.default_rng(0)
    model.eval()

    def prompt() -> list[int]:
        return rng.integers(3, vocabulary, PROMPT_TOKENS).tolist()

    clean = activations(model, points, prompt())
    tensors: dict = {}
    for point in points:
        there = layers_at(point, layers)
        typical, width = clean[point, there[len(there) // 2]].square().mean().sqrt().item(), clean[point, 0].shape[1]
        tensors |= {f"{point}-{key}": v for key, v in tensors_for(len(there), width, typical, len(tensors)).items()}
    cases = {f"{point} {name}": edits for point in points for name, edits in programs(point, layers).items()}
    dice = random.Random(SEED)
    for index in range(random_programs):
        cases[f"random {index}"] = by_point(random_program(dice, layers, points, strength=0.7))
    cases["unsteered"] = ()
    prompts: dict[str, list[int]] = {}
    for name in cases:
        prompts[name] = prompts[name.removesuffix(BELOW) + "above"] if name.endswith(BELOW) else prompt()
    requests = [Request(prompts[name], edits, NEW_TOKENS, prompt_logprobs=True) for name, edits in cases.items()]
    # Steps of three prompts' tokens, so that prompts are split, at any place, and mixed with decodes.
    engine = {
        "model": str(folder),
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        **(engine_args or {}),
    }
    everything = Span(), [(point, layer) for point in points for layer in layers_at(point, layers)]
    captures = [
        (requests[0].prompt, CaptureSpec(tuple(everything[1]), everything[0], keep)) for keep in ("rows", "mean")
    ]
    operands = {key: (key.partition("-")[0], pack(by_layer)) for key, by_layer in tensors.items()}
    run = run_engine(job, operands, [requests], engine, captures, env, {"bank_bytes": 1 << 29, **(config or {})})
    check_captures(model, points, requests[0].prompt, run.captures)
    moved: dict[str, float] = {}
    for (name, edits), request, result in zip(cases.items(), requests, run.rounds[0], strict=True):
        most = check_case(model, tensors, name, Program(edits), request, result)
        kind = "random" if name.startswith("random") else name.removesuffix(" above").removesuffix(f" {BELOW}")
        moved[kind] = max(moved.get(kind, 0), most)
    del moved["unsteered"]
    still = {kind: most for kind, most in moved.items() if most < 5 * TOLERANCE}
    assert still.keys() == may_rest, f"these moved nothing, or hardly anything, which proves nothing: {still}"


def check_case(
    model: torch.nn.Module, tensors: Tensors, name: str, program: Program, request: Request, result: Result
) -> float:
    """How far the program moved any log-probability."""
    ids = request.prompt + result.tokens
    found = torch.tensor(result.prompt_logprobs + result.logprobs)
    expected, margin = log_probabilities(model, tensors, program, ids, PROMPT_TOKENS)
    worst = (found - torch.tensor(expected)).abs().max().item()
    assert worst < TOLERANCE or margin < UNDECIDED, f"{name}: log-probabilities differ by {worst}: {program.edits}"
    ran = PROMPT_TOKENS + NEW_TOKENS - 1
    for edit, intervals, touched in zip(program.edits, program.intervals(PROMPT_TOKENS), result.touched, strict=True):
        tokens = sum(min(end, ran) - start for start, end in intervals if start < ran)
        if edit.gate is None:
            assert touched == [tokens] * len(edit.layers), name
        else:
            assert all(0 <= each <= tokens for each in touched), name
    unsteered = torch.tensor(log_probabilities(model, tensors, Program(()), ids, PROMPT_TOKENS)[0])
    return (found - unsteered).abs().max().item()


def check_captures(model: torch.nn.Module, points, prompt: list[int], captures: list[dict[str, np.ndarray]]) -> None:
    """The activations of the prompt are those of transformers' modules."""
    rows, mean = captures
    for (point, layer), x in activations(model, points, prompt).items():
        name, scale = f"{point}.{layer}", x.norm(dim=1).mean().item()
        assert np.abs(rows[name] - x.numpy()).max() < 1e-3 * scale, name
        assert np.abs(mean[name] - x.mean(0).numpy()).max() < 1e-3 * scale, name
        np.testing.assert_allclose(mean[f"{name}.norm"], x.norm(dim=1).mean().numpy(), rtol=1e-3)


@pytest.mark.parametrize("family", sorted(TINY))
def test_every_opcode_point_and_span_equals_transformers(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    # Gemma 2 caps its attention scores, which only transformers' eager attention does.
    config = TINY[family]()
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    if config.tie_word_embeddings:
        # Each token would all but surely predict itself, whatever is done to it: signs in the last norm undo that.
        torch.nn.init.normal_(model.model.norm.weight, mean=-1)
    model.save_pretrained(tmp_path / "model")
    check(model, tmp_path / "model", tmp_path, random_programs=40)


def test_the_demo_model_equals_transformers(smollm2: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    # Its last prompt token's coefficients lie within the bounds that this one clamps to.
    check(model, smollm2, tmp_path, 0, points=("resid_post",), may_rest={"resid_post rank 3 last"})


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: apt-get install g++")
def test_compiled_code_equals_transformers(tmp_path: Path) -> None:
    """The registered op under torch.compile; every point is asked for, since compiled code has only one by default."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(TINY["llama"](), dtype=torch.float32)
    model.save_pretrained(tmp_path / "model")
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    compiled = {"enforce_eager": False}
    check(model, tmp_path / "model", tmp_path, 20, env=env, config={"points": list(POINTS)}, engine_args=compiled)
