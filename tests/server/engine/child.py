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
    """One prompt of token ids, greedy. It is aborted after so many steps of the engine, if it still runs then."""

    prompt: list[int]
    edits: tuple[Edit, ...] = ()
    max_tokens: int = 32
    prompt_logprobs: bool = False
    choices: int = 1
    abort_after: int | None = None


class Result(NamedTuple):
    """What came back. `touched` is [edits][layers of the edit]; `prompt_logprobs` leaves out the first token; `others`
    are the tokens of further choices. One that was aborted has nothing but that.
    """

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    cached: int
    touched: list[list[int]]
    others: list[list[int]]
    aborted: bool = False


class Run(NamedTuple):
    """The results [rounds][requests], how often the scheduler preempted a request, what was captured, by site, and how
    often an operand was uploaded.
    """

    rounds: list[list[Result]]
    preemptions: int
    captures: list[dict[str, np.ndarray]]
    runner: str
    uploads: int


def run_engine(
    folder: Path,
    operands: Mapping[str, tuple[Point, Operand]],
    rounds: list[list[Request]],
    engine: dict[str, Any],
    captures: Sequence[tuple[list[int], CaptureSpec]] = (),
    env: Mapping[str, str] | None = None,
    config: Mapping[str, Any] | None = None,
    reload: bool = False,
) -> Run:
    """`operands` by bank key, each with its point; `captures` are token ids and what to capture of them. With `reload`
    they are uploaded before the round that needs them, into a bank that may be too small for all.

    `env` is added to the child's environment, `config` to polyhelm's part of the engine's configuration.
    """
    job = {
        "engine": engine,
        "reload": reload,
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
    return Run(results, answer["preemptions"], captured, answer["runner"], answer["uploads"])


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
    uploads = 0 if job["reload"] else upload(llm, job["operands"], data)
    preemptions, rounds = count_preemptions(llm), []
    for index, requests in enumerate(job["rounds"]):
        if job["reload"]:
            keys = {edit["operand"] for request in requests for edit in request["edits"] if "operand" in edit}
            uploads += upload(llm, {key: job["operands"][key] for key in sorted(keys)}, data)
        rounds.append(run_round(llm, index, requests))
    for index, (ids, wire) in enumerate(job["captures"]):
        (folder / f"capture-{index}").write_bytes(capture(llm, ids, wire.encode()))
    (described, *_) = llm.collective_rpc("polyhelm_describe")
    answer = {"rounds": rounds, "preemptions": len(preemptions), "runner": described["runner"], "uploads": uploads}
    (folder / "results.json").write_text(json.dumps(answer))


def upload(llm: Any, operands: Mapping[str, Any], data: Mapping[str, np.ndarray]) -> int:
    """As the server's uploader does, but in this process. Returns how many operands weren't there already."""
    core = llm.llm_engine.engine_core.engine_core
    (grant,) = core.polyhelm_reserve([[[key, *of[:2], len(data[key])] for key, of in operands.items()]])
    for key, serial in grant["uploads"].items():
        assert core.polyhelm_write(key, serial, 0, data[key].astype("<f4").tobytes()) == "written"
        assert core.polyhelm_bind(key, serial, operands[key][2]) == "loaded"
    return len(grant["uploads"])


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
    from vllm.sampling_params import RequestOutputKind

    from server.engine.seams import PROGRAM, RECEIPT

    engine, aborts, finished = llm.llm_engine, {}, {}
    for number, request in enumerate(requests):
        program = Program(tuple(Edit.from_json(edit) for edit in request["edits"]))
        name = f"{index}-{number}"
        params = SamplingParams(
            # The best token alone; greedy sampling would give one choice only.
            temperature=1 if request["choices"] > 1 else 0,
            top_k=1 if request["choices"] > 1 else 0,
            n=request["choices"],
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            detokenize=False,
            logprobs=0,
            prompt_logprobs=0 if request["prompt_logprobs"] else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args={PROGRAM: program.wire, RECEIPT: name.encode()} if program.edits else None,
        )
        engine.add_request(name, {"prompt_token_ids": request["prompt"]}, params)
        if request["abort_after"] is not None:
            aborts[name] = request["abort_after"]
    steps = 0
    while engine.has_unfinished_requests():
        finished |= {output.request_id: output for output in engine.step() if output.finished}
        steps += 1
        if due := [name for name, after in aborts.items() if after == steps and name not in finished]:
            engine.abort_request(due)
    steered = [
        name
        for number, request in enumerate(requests)
        if request["edits"] and (name := f"{index}-{number}") in finished
    ]
    (counts, *_) = llm.collective_rpc("polyhelm_receipts", args=(steered,))
    touched = dict(zip(steered, counts, strict=True))
    return [
        result(finished.get(f"{index}-{number}"), touched.get(f"{index}-{number}")) for number in range(len(requests))
    ]


def result(output: Any, counts: dict[str, Any] | None) -> dict[str, Any]:
    """Of a request's output, which is None where it was aborted."""
    if output is None:
        nothing: dict[str, Any] = {name: [] for name in ("tokens", "logprobs", "prompt_logprobs", "touched", "others")}
        return {**nothing, "cached": 0, "aborted": True}
    first, *others = output.outputs
    return {
        "tokens": list(first.token_ids),
        "logprobs": chosen(first.token_ids, first.logprobs),
        "prompt_logprobs": chosen(output.prompt_token_ids, output.prompt_logprobs),
        "cached": output.num_cached_tokens,
        "touched": counts["touched"] if counts else [],
        "others": [list(each.token_ids) for each in others],
    }


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
