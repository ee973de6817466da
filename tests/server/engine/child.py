"""Runs vLLM with polyhelm's seams in a process of its own, as a script that reads a job and writes its results.

A job holds the engine's arguments, the vectors to load, and rounds of requests; the requests of a round run together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from server.engine.edits import Edit, Program


class Request(NamedTuple):
    """One prompt of token ids, greedy."""

    prompt: list[int]
    edits: tuple[Edit, ...] = ()
    max_tokens: int = 32
    prompt_logprobs: bool = False


class Result(NamedTuple):
    """What came back. `touched` is [edits][sites]; `prompt_logprobs` leaves out the first token."""

    tokens: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    cached: int
    touched: list[list[int]]


class Run(NamedTuple):
    """The results [rounds][requests], how often the scheduler preempted a request, and what was captured.

    `captures` has, for each text and pooling, `<index>-<pooling>-mean` [layers, hidden] and `-norm` [layers].
    """

    rounds: list[list[Result]]
    preemptions: int
    captures: dict[str, np.ndarray]


def run_engine(
    folder: Path,
    vectors: dict[str, np.ndarray],
    rounds: list[list[Request]],
    engine: dict[str, Any],
    texts: Sequence[list[int]] = (),
) -> Run:
    """`vectors` are float32 [layers, hidden] by bank key; `texts` are token ids whose activations are captured."""
    job = {
        "engine": engine,
        "texts": texts,
        "rounds": [
            [{**each._asdict(), "edits": [edit.to_json() for edit in each.edits]} for each in r] for r in rounds
        ],
    }
    (folder / "job.json").write_text(json.dumps(job))
    np.savez(folder / "vectors.npz", **vectors)
    child = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, timeout=900)
    assert child.returncode == 0, child.stdout[-3000:] + child.stderr[-6000:]
    answer = json.loads((folder / "results.json").read_text())
    results = [[Result(**each) for each in results] for results in answer["rounds"]]
    return Run(results, answer["preemptions"], dict(np.load(folder / "captures.npz")))


def main(folder: Path) -> None:
    os.environ |= {
        "POLYHELM_ENGINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    from vllm import LLM

    job = json.loads((folder / "job.json").read_text())
    llm = LLM(
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        seed=0,
        disable_log_stats=False,
        worker_extension_cls="server.engine.worker.WorkerExtension",
        additional_config={"polyhelm": {"bank_slots": 32, "max_edits": 8}},
        **job["engine"],
    )
    for slot, (key, data) in enumerate(np.load(folder / "vectors.npz").items()):
        llm.collective_rpc("polyhelm_load", args=(key, slot, list(range(len(data))), data.astype("<f4").tobytes()))
    preemptions = count_preemptions(llm)
    rounds = [run_round(llm, index, requests) for index, requests in enumerate(job["rounds"])]
    np.savez(folder / "captures.npz", **captures(llm, job["texts"]))
    (folder / "results.json").write_text(json.dumps({"rounds": rounds, "preemptions": len(preemptions)}))


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
    (counts,) = llm.collective_rpc("polyhelm_receipts", args=(steered,))
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


def captures(llm: Any, texts: list[list[int]]) -> dict[str, np.ndarray]:
    from vllm import SamplingParams

    from server.engine.seams import CAPTURE, RECEIPT

    names = [f"{index}-{pooling}" for index in range(len(texts)) for pooling in ("last", "mean")]
    params = [
        SamplingParams(
            max_tokens=1,
            detokenize=False,
            skip_reading_prefix_cache=True,
            extra_args={CAPTURE: name.partition("-")[2].encode(), RECEIPT: name.encode()},
        )
        for name in names
    ]
    llm.generate([{"prompt_token_ids": ids} for ids in texts for _ in range(2)], params, use_tqdm=False)
    (captured,) = llm.collective_rpc("polyhelm_captures", args=(names,))
    arrays: dict[str, np.ndarray] = {}
    for name, each in zip(names, captured, strict=True):
        norm = np.frombuffer(each["norm"], np.float32)
        arrays[f"{name}-norm"] = norm
        arrays[f"{name}-mean"] = np.frombuffer(each["mean"], np.float32).reshape(len(norm), -1)
    return arrays


def chosen(tokens: list[int], logprobs: list[dict[int, Any] | None] | None) -> list[float]:
    """The log-probabilities of the tokens themselves; vLLM has none for a prompt's first token."""
    pairs = zip(tokens, logprobs, strict=True) if logprobs else ()
    return [at[token].logprob for token, at in pairs if at is not None]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
