"""The start-up self-check: proves on the running engine that steering happens, and refuses to serve when it doesn't.

The worst bug of this field is fluent, unsteered text under a steered label: a hook that never fires. So every installed
site must move the output, the op must count exactly the tokens that it should, a forged program must be refused, and
steered and unsteered requests must not share cache blocks.

Several API processes probe one engine at the same time: receipts and cache blocks are those of one probe. The operands
are equal, and so shared.
"""

from __future__ import annotations

import asyncio
import uuid

import numpy as np
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput

from server.engine.client import Counts, Engine
from server.engine.edits import Edit, Point, Program, layers_at
from server.engine.operands import Operand, pack
from server.engine.seams import PROGRAM, SeamError

STRENGTH = 2.0
PROMPT_TOKENS = 3


async def probe(engine: Engine) -> None:
    """Raise SeamError, naming what failed. Sets `engine.prefix_cache`."""
    own = f"polyhelm-probe-{uuid.uuid4().hex}"
    for point, info in engine.points.items():
        if info["opcodes"]:
            await _check_sites(engine, point, own)  # type: ignore[arg-type]
    await _check_admission(engine)
    await _check_prefix_cache(engine, own)


def _program(point: Point, layer: int) -> Program:
    """Scale a random half of the activation: the one opcode that acts at every point, whatever its size there."""
    return Program((Edit("scale", f"polyhelm-probe-{point}", (layer,), STRENGTH, point=point),))


async def _load(engine: Engine, program: Program) -> None:
    (edit,) = program.edits
    assert edit.operand is not None
    width = engine.points[edit.point]["width"]

    async def operand() -> Operand:
        rng = np.random.default_rng(0)
        layers = layers_at(edit.point, engine.layers)
        return pack({layer: {"mask": rng.integers(0, 2, width).astype(np.float32)} for layer in layers})

    await engine.ensure(program, {edit.operand: operand})


def _greedy() -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=1, logprobs=0)


def _first(output: RequestOutput) -> tuple[int, float | None]:
    completion = output.outputs[0]
    return completion.token_ids[0], completion.cumulative_logprob


async def _check_sites(engine: Engine, point: Point, own: str) -> None:
    """One request per layer, all in one batch with an unsteered one. `own` is in the names of this probe only."""
    prompt, layers = list(range(5, 5 + PROMPT_TOKENS)), layers_at(point, engine.layers)
    await _load(engine, _program(point, 0))

    async def steered(layer: int) -> tuple[tuple[int, float | None], Counts]:
        receipt = f"{own}-{point}-{layer}"
        output = await engine.generate(prompt, _greedy(), _program(point, layer), receipt, own)
        return _first(output), await engine.receipt(receipt)

    plain, *results = await asyncio.gather(
        engine.generate(prompt, _greedy(), cache_salt=own), *(steered(layer) for layer in layers)
    )
    for layer, (first, counts) in zip(layers, results, strict=True):
        if first == _first(plain):
            raise SeamError(f"{point}.{layer} is installed but editing it doesn't change the output")
        if counts != Counts([[PROMPT_TOKENS]], [0]):
            raise SeamError(f"{point}.{layer} counted {counts}, expected {PROMPT_TOKENS} tokens")


async def _check_admission(engine: Engine) -> None:
    params = _greedy()
    params.extra_args = {PROGRAM: "forged"}
    try:
        await engine.generate([5], params)
    except VLLMValidationError:
        return
    raise SeamError("a program that polyhelm didn't make was admitted")


async def _check_prefix_cache(engine: Engine, own: str) -> None:
    """Steered and unsteered requests with one prompt and salt must not share blocks, and equal ones must."""
    cache = engine.client.vllm_config.cache_config
    if not cache.enable_prefix_caching:
        engine.prefix_cache = "off"
        return
    block = cache.block_size
    prompt = [5 + position % 50 for position in range(block + 1)]
    if len(prompt) >= engine.max_model_len:
        raise SeamError(f"--max-model-len must exceed the cache block size, {block} (or set a smaller --block-size)")
    program = _program("resid_post", 0)
    await _load(engine, program)

    async def cached_tokens(program: Program | None, salt: str) -> int | None:
        return (await engine.generate(prompt, _greedy(), program, cache_salt=salt)).num_cached_tokens

    cached = [await cached_tokens(each, own) for each in (None, program, program, None)]
    if cached == [0, 0, block, block]:
        engine.prefix_cache = "tagged"
        return
    salted = [await cached_tokens(program, f"{own}-{program.fingerprint}") for _ in range(2)]
    if salted != [0, block]:
        raise SeamError(f"steered requests share cache blocks with others: cached {cached}, with salt {salted}")
    engine.prefix_cache = "cache_salt"
