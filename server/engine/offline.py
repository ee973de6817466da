"""Captured activations for vLLM's offline `LLM`, without a server. The environment must have POLYHELM_ENGINE=1 before
vllm is imported.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from vllm import SamplingParams

from server.engine.capture import CaptureSpec
from server.engine.capture_plan import CapturePlan, PlanError, Positions, chosen_positions, chosen_sites
from server.engine.plugin import ENABLED
from server.engine.seams import CAPTURE, RECEIPT
from server.engine.spool import joined

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
) -> list[dict[str, np.ndarray]]:
    """For each prompt, by site: rows [tokens, width] in order of position, or the mean [width] for positions "mean".

    Beside them are `token_ids` (int64, prompt and generated) and `positions` (int64, of the rows). The arguments are
    the fields of POST /v1/activations. Rows beyond `memory_bytes` are on disk until they are returned. Raises
    PlanError, a ValueError, where the arguments can't be meant, and RuntimeError where nothing can be captured.
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
    receipts = [uuid.uuid4().hex for _ in ids]
    with TemporaryDirectory(prefix="polyhelm-captures-") as folder:
        spec = CaptureSpec(plan.sites, plan.span, plan.keep, dtype, folder, memory_bytes // len(ids))
        try:
            outputs = llm.generate(
                [{"prompt_token_ids": each} for each in ids],
                [_params(spec, receipt, max_tokens, temperature, seed) for receipt in receipts],
                use_tqdm=False,
            )
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


def _params(spec: CaptureSpec, receipt: str, max_tokens: int, temperature: float, seed: int | None) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        skip_reading_prefix_cache=True,
        detokenize=False,
        extra_args={CAPTURE: spec.wire, RECEIPT: receipt.encode()},
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
