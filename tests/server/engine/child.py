"""Runs vLLM with polyhelm's seams in a process of its own, as a script that reads a job and writes its results.

A job holds the engine's arguments, the vectors to load, and rounds of requests; the requests of a round run together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from server.engine.capture import CaptureSpec
from server.engine.edits import Edit, Point, Program
from server.engine.operands import Operand


class Request(NamedTuple):
    """One prompt of token ids, greedy."""

    prompt: list[int]
    edits: tuple[Edit, ...] = ()
    max_tokens: int = 32
    prompt_logprobs: bool = False


class Result(NamedTuple):
    """What came back. `touched` is [edits][layers of the edit]; `prompt_logprobs` leaves out the first token."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    cached: int
    touched: list[list[int]]


class Run(NamedTuple):
    """The results [rounds][requests], how often the scheduler preempted a request, and what was captured, by site."""

    rounds: list[list[Result]]
    preemptions: int
    captures: list[dict[str, np.ndarray]]
    runner: str


def run_engine(
    folder: Path,
    operands: Mapping[str, tuple[Point, Operand]],
    rounds: list[list[Request]],
    engine: dict[str, Any],
    captures: Sequence[tuple[list[int], CaptureSpec]] = (),
    env: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Run:
    """`operands` by bank key, each with its point; `captures` are token ids and what to capture of them.

    `env` is added to the child's environment, `config` to polyhelm's part of the engine's configuration.
    """
    job = {
        "engine": engine,
        "config": {"bank_bytes": 64 << 20, "max_edits": 8, **(config or {})},
        "operands": {key: [point, each.width, each.pieces] for key, (point, each) in operands.items()},
        "captures": [[ids, spec.wire.decode()] for ids, spec in captures],
        "rounds": [
            [{**each._asdict(), "edits": [edit.to_json() for edit in each.edits]} for each in r] for r in rounds
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    np.savez(folder / "operands.npz", **{key: each.data for key, (_, each) in operands.items()})
    command, environment = [sys.executable, __file__, str(folder)], {**os.environ, **(env or {})}
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-6000:]
    answer = json.loads((folder / "results.json").read_text())
    results = [[Result(**each) for each in results] for results in answer["rounds"]]
    captured = [safetensors.numpy.load_file(folder / f"capture-{index}") for index in range(len(captures))]
    return Run(results, answer["preemptions"], captured, answer["runner"])


def main(folder: Path) -> None:
    os.environ |= {
        "POLYHELM_ENGINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM

    job = json.loads((folder / "job.json").read_text())
    arguments = {"dtype": "float32", "enforce_eager": True, "seed": 0, **job["engine"]}
    llm = LLM(
        skip_tokenizer_init=True, disable_log_stats=False, additional_config={"polyhelm": job["config"]}, **arguments
    )
    data = np.load(folder / "operands.npz")
    for key, (point, width, pieces) in job["operands"].items():
        upload(llm, key, point, width, pieces, data[key])
    preemptions = count_preemptions(llm)
    rounds = [run_round(llm, index, requests) for index, requests in enumerate(job["rounds"])]
    for index, (ids, wire) in enumerate(job["captures"]):
        (folder / f"capture-{index}").write_bytes(capture(llm, ids, wire.encode()))
    (described, *_) = llm.collective_rpc("polyhelm_describe")
    answer = {"rounds": rounds, "preemptions": len(preemptions), "runner": described["runner"]}
    (folder / "results.json").write_text(json.dumps(answer))


def upload(llm: Any, key: str, point: str, width: int, pieces: list[Any], data: np.ndarray) -> None:
    """As the server's uploader does, but in this process."""
    core = llm.llm_engine.engine_core.engine_core
    (grant,) = core.polyhelm_reserve([[[key, point, width, len(data)]]])
    serial = grant["uploads"][key]
    assert core.polyhelm_write(key, serial, 0, data.astype("<f4").tobytes()) == "written"
    assert core.polyhelm_bind(key, serial, pieces) == "loaded"


def count_preemptions(llm: Any) -> list[str]:
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    original, seen = scheduler._preempt_request, []

    def preempt(request: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(request.request_id)
        return original(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    return seen


def run_round(llm: Any, index: int, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from vllm import SamplingParams

    from server.engine.seams import PROGRAM, RECEIPT

    params = []
    for number, request in enumerate(requests):
        program = Program(tuple(Edit.from_json(edit) for edit in request["edits"]))
        extra = {PROGRAM: program.wire, RECEIPT: f"{index}-{number}".encode()} if program.edits else None
        params.append(
            SamplingParams(
                temperature=0,
                max_tokens=request["max_tokens"],
                ignore_eos=True,
                detokenize=False,
                logprobs=0,
                prompt_logprobs=0 if request["prompt_logprobs"] else None,
                extra_args=extra,
            )
        )
    prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    steered = [f"{index}-{number}" for number, request in enumerate(requests) if request["edits"]]
    (counts, *_) = llm.collective_rpc("polyhelm_receipts", args=(steered,))
    touched = dict(zip(steered, counts, strict=True))
    return [
        {
            "tokens": list(output.outputs[0].token_ids),
            "logprobs": chosen(output.outputs[0].token_ids, output.outputs[0].logprobs),
            "prompt_logprobs": chosen(output.prompt_token_ids, output.prompt_logprobs),
            "cached": output.num_cached_tokens,
            "touched": touched[f"{index}-{number}"]["touched"] if f"{index}-{number}" in touched else [],
        }
        for number, output in enumerate(outputs)
    ]


def capture(llm: Any, ids: list[int], wire: bytes) -> bytes:
    from vllm import SamplingParams

    from server.engine.seams import CAPTURE, RECEIPT

    extra = {CAPTURE: wire, RECEIPT: b"capture"}
    params = SamplingParams(max_tokens=1, detokenize=False, skip_reading_prefix_cache=True, extra_args=extra)
    llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
    (captured, *_) = llm.collective_rpc("polyhelm_captured", args=("capture",))
    return captured


def chosen(tokens: list[int], logprobs: list[dict[int, Any] | None] | None) -> list[float]:
    """The log-probabilities of the tokens themselves; vLLM has none for a prompt's first token."""
    pairs = zip(tokens, logprobs, strict=True) if logprobs else ()
    return [at[token].logprob for token, at in pairs if at is not None]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
