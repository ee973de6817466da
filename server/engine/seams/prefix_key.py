"""Tags the prefix-cache blocks that a program touched, so that no two programs share one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from server.engine.edits import Program
from server.engine.seams import PROGRAM, SeamError, program_of, wrap


def patch() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.simple_kv_offload import manager

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def generate_block_hash_extra_keys(
            request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
        ) -> tuple[tuple[Any, ...] | None, int]:
            keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
            program = program_of(request.sampling_params)
            if program is None:
                return keys, next_mm_idx
            tag = program.block_tag(_intervals(request, program), start_token_idx, end_token_idx)
            return (keys if tag is None else (*(keys or ()), ("polyhelm", tag))), next_mm_idx

        return generate_block_hash_extra_keys

    name = "generate_block_hash_extra_keys"
    wrap(
        kv_cache_utils,
        "generate_block_hash_extra_keys",
        ("request", "start_token_idx", "end_token_idx", "start_mm_idx"),
        make,
    )
    for importer in (block_pool, manager):
        if not hasattr(importer, name):
            raise SeamError(f"{importer.__name__} no longer imports {name}")
        setattr(importer, name, getattr(kv_cache_utils, name))
    _check(kv_cache_utils.generate_block_hash_extra_keys)


def _intervals(request: Any, program: Program) -> Any:
    intervals = getattr(request, "polyhelm_intervals", None)
    if intervals is None:
        intervals = request.polyhelm_intervals = program.intervals(request.num_prompt_tokens)
    return intervals


def _check(generate: Callable[..., Any]) -> None:
    wire = b'[{"layers":[0],"opcode":"add","operand":"check","span":{"prompt":false},"strength":1.0}]'
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args={PROGRAM: wire}),
        num_prompt_tokens=8,
        mm_features=[],
        lora_request=None,
        cache_salt=None,
        prompt_embeds=None,
    )
    if generate(request, 0, 8, 0)[0] is not None or not generate(request, 0, 16, 0)[0]:
        raise SeamError("prefix-cache keys don't follow the program")
