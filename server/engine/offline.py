"""Captured activations for vLLM's offline `LLM`, steered or not, without a server. The environment must have
POLYHELM_ENGINE=1 before vllm is imported.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from vllm import SamplingParams

from server.engine.bank_directory import BankTooSmall, Want
from server.engine.capture import CaptureSpec
from server.engine.capture_plan import CapturePlan, PlanError, Positions, chosen_positions, chosen_sites
from server.engine.client import merged, salted
from server.engine.edits import Program
from server.engine.operands import Operand, content_key
from server.engine.plugin import ENABLED
from server.engine.scoring import check_touched
from server.engine.seams import CAPTURE, PROGRAM, RECEIPT
from server.engine.spool import joined
from server.engine.uploader import CHUNK_BYTES

if TYPE_CHECKING:
    from vllm import LLM

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, or {"messages": [...]} for the model's chat template."""


def activations(
    llm: LLM,
    prompts: Sequence[Prompt],
    sites: Sequence[str] | Mapping[str, Any],
    positions: Positions = "last",
    *,
    generation: bool = False,
    max_tokens: int = 1,
    temperature: float = 0.0,
    seed: int | None = None,
    dtype: Literal["float32", "float16"] = "float32",
    memory_bytes: int = 64 << 20,
    program: Program | None = None,
    operands: Mapping[str, Operand] | None = None,
) -> list[dict[str, np.ndarray]]:
    """For each prompt, by site: rows [tokens, width] in order of position, or the mean [width] for positions "mean".

    Beside them are `token_ids` (int64, prompt and generated) and `positions` (int64, of the rows). The arguments are
    the fields of POST /v1/activations. Rows beyond `memory_bytes` are on disk until they are returned.

    With a `program` every prompt is steered by it; `operands` are its, by the names that its edits give them. Raises
    PlanError or ProgramError, which are ValueErrors, where the arguments can't be meant, BankTooSmall, and RuntimeError
    where nothing can be captured or an edit didn't act where it should have.
    """
    if os.environ.get(ENABLED) != "1":
        raise RuntimeError(f"set {ENABLED}=1 in the environment before vllm is imported")
    (described, *_) = llm.collective_rpc("polyhelm_describe")
    if described["captures"] is not None:
        raise RuntimeError(described["captures"])
    plan = CapturePlan(
        chosen_sites(sites, described["layers"], described["points"]), chosen_positions(positions), generation
    )
    ids = [_token_ids(llm, prompt, f"prompts.{index}") for index, prompt in enumerate(prompts)]
    for each in ids:
        plan.check_positions(len(each))
    if not ids:
        return []
    if program is not None:
        program.check()
        program = _upload(llm, program, operands or {})
    # No other call may read the blocks that are left behind, also where they can't be tagged.
    salt = {} if program is None else {"cache_salt": salted(None, program)}
    receipts = [uuid.uuid4().hex for _ in ids]
    with TemporaryDirectory(prefix="polyhelm-captures-") as folder:
        spec = CaptureSpec(plan.sites, plan.span, plan.keep, dtype, folder, memory_bytes // len(ids))
        try:
            outputs = llm.generate(
                [{"prompt_token_ids": each, **salt} for each in ids],
                [_params(spec, program, receipt, max_tokens, temperature, seed) for receipt in receipts],
                use_tqdm=False,
            )
            if program is not None:
                for receipt, each, output in zip(receipts, ids, outputs, strict=True):
                    _check(llm, program, receipt, len(each), len(output.outputs[0].token_ids))
            return [
                _collected(llm, plan, receipt, each, list(output.outputs[0].token_ids), described["points"])
                for receipt, each, output in zip(receipts, ids, outputs, strict=True)
            ]
        except BaseException:
            for receipt in receipts:
                llm.collective_rpc("polyhelm_drop_captured", args=(receipt,))
            raise


def _token_ids(llm: LLM, prompt: Prompt, where: str) -> list[int]:
    if isinstance(prompt, str):
        ids = llm.get_tokenizer()(prompt)["input_ids"]
    elif isinstance(prompt, Mapping):
        ids = llm.get_tokenizer().apply_chat_template(
            prompt["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )
    else:
        ids = prompt
    if not ids:
        raise PlanError(where, "has no tokens")
    return list(ids)


def _upload(llm: LLM, program: Program, operands: Mapping[str, Operand]) -> Program:
    """Put a program's operands into the bank; returns it with the keys under which they are there."""
    wanted: dict[str, tuple[Want, Operand]] = {}
    edits = []
    for edit in program.edits:
        if edit.operand is not None:
            operand = operands[edit.operand]
            # By content: other numbers under the name of an earlier call are others.
            key = content_key(operand, edit.point)
            wanted[key] = Want(key, edit.point, operand.width, operand.data.size), operand
            edit = replace(edit, operand=key)
        edits.append(edit)
    (promised,) = _core(llm, "polyhelm_reserve", [[want for want, _ in wanted.values()]])
    if "error" in promised:
        raise ValueError(promised["error"])
    if "uploads" not in promised:
        raise BankTooSmall(f"the operands need {promised['needed']} bytes, and the bank has {promised['budget']}")
    for key, serial in promised["uploads"].items():
        operand, step = wanted[key][1], CHUNK_BYTES // 4
        for start in range(0, operand.data.size, step):
            data = operand.data[start : start + step].astype("<f4", copy=False).tobytes()
            _core(llm, "polyhelm_write", key, serial, start, data)
        if _core(llm, "polyhelm_bind", key, serial, operand.pieces) != "loaded":
            raise RuntimeError(f"the bank gave the place of {key} away while it was uploaded")
    return Program(tuple(edits))


def _core(llm: LLM, method: str, *arguments: Any) -> Any:
    """Call a method of the engine core, in this process or in its own."""
    client: Any = llm.llm_engine.engine_core
    if hasattr(client, "call_utility"):
        return client.call_utility(method, *arguments)
    return getattr(client.engine_core, method)(*arguments)


def _check(llm: LLM, program: Program, receipt: str, prompt_length: int, generated: int) -> None:
    workers = [counts for (counts,) in llm.collective_rpc("polyhelm_receipts", args=([receipt],))]
    counts = merged([workers])
    if counts is None:
        raise RuntimeError("a prompt ran without its program")
    check_touched(program, counts.touched, counts.cached, prompt_length, generated)


def _params(
    spec: CaptureSpec, program: Program | None, receipt: str, max_tokens: int, temperature: float, seed: int | None
) -> SamplingParams:
    steered = {} if program is None else {PROGRAM: program.wire}
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        skip_reading_prefix_cache=True,
        detokenize=False,
        extra_args={CAPTURE: spec.wire, RECEIPT: receipt.encode(), **steered},
    )


def _collected(
    llm: LLM, plan: CapturePlan, receipt: str, prompt: list[int], generated: list[int], points: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    ran = plan.ran(len(prompt), len(generated))
    answers = llm.collective_rpc("polyhelm_captured", args=(receipt, len(ran)))
    stored = joined(answers, points)
    if missing := {f"{point}.{layer}" for point, layer in plan.sites} - stored.keys():
        raise RuntimeError(f"nothing was captured at {', '.join(sorted(missing))}")
    arrays = {f"{point}.{layer}": stored[f"{point}.{layer}"].numpy() for point, layer in plan.sites}
    return {**arrays, "token_ids": np.array(prompt + generated, np.int64), "positions": ran}
