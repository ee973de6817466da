"""What steering costs: tokens/s of polyhelm against plain vLLM and against transformers with hooks, and the host time
to admit a steered request.

Two engines with the same settings, one without polyhelm, take turns in one run: each measurement of polyhelm is divided
by the mean of the plain ones just before and after it, and the median ratio is reported with its quartiles. Both run
eagerly. That polyhelm's engine sleeps where plain vLLM's spins (server/engine/seams/waiting.py) is part of the ratio.

    make bench-setup && .venv/bin/python benchmarks/engine_overhead.py
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe, environment
from spread import spread

from server.engine.edits import POINTS, Condition, Edit, Function, Program
from server.engine.operands import Operand, pack
from server.engine.spans import Span
from server.models import model_identity, resolve_model

REQUESTS, TOKENS, PROMPT_TOKENS = 16, 128, 32
LAYERS, HIDDEN, NEURONS = 30, 576, 1536
EVERY_LAYER, ONE_LAYER = tuple(range(LAYERS)), (14,)
LAST_PROMPT_TOKEN = Span(prompt=False, generation=False, prompt_positions=(-1,))
SMALL = 1e-3
"""Strength: the text, and with it the work, stays that of the model."""
MODES = {
    "idle": ("nobody steered", 0.99),
    "one layer": ("`add` at one layer, 16 different vectors", 0.98),
    "all layers": ("`add` at all 30 layers, 16 different vectors", 0.96),
    "scale": ("`scale` of 100 neurons over all layers, 16 different sets", 0.97),
    "rank": ("`rank`: 8 SAE features clamped at one layer, 16 different sets", 0.97),
    "map": ("`map` of rank 256 at the last prompt token of all layers", 0.95),
    "programs": ("16 different programs at all layers, with all opcodes and gates", 0.95),
}
"""What each mode does, and the ratio to plain vLLM that it should reach."""
RESULTS = Path(__file__).parent / "results" / "engine_overhead.json"
PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def edits(mode: str, index: int) -> tuple[Edit, ...]:
    """What request `index` of a mode asks for."""
    own = f"-{index}"
    add = Edit("add", f"vector{own}", EVERY_LAYER, SMALL)
    if mode == "idle":
        return ()
    if mode == "one layer":
        return (Edit("add", f"vector{own}", ONE_LAYER, SMALL),)
    if mode == "all layers":
        return (add,)
    if mode == "scale":
        return (Edit("scale", f"neurons{own}", EVERY_LAYER, SMALL, point="mlp_act"),)
    if mode == "rank":
        clamped = Function("jumprelu", low=(0.5,) * 8, high=(8.0,) * 8)
        return (Edit("rank", f"features{own}", ONE_LAYER, SMALL, function=clamped),)
    if mode == "map":
        return (Edit("map", "map", EVERY_LAYER, SMALL, LAST_PROMPT_TOKEN),)
    gate = Edit("gate", f"vector{own}", ONE_LAYER, condition=Condition("cosine", -1.0, scope="sequence"))
    kinds: tuple[tuple[Edit, ...], ...] = (
        (add,),
        (Edit("add_norm", f"vector{own}", EVERY_LAYER, SMALL),),
        (Edit("scale", f"neurons{own}", EVERY_LAYER, SMALL, point="mlp_act"),),
        (Edit("rank", f"features{own}", EVERY_LAYER, SMALL, function=Function("relu")),),
        (add, Edit("renorm", None, EVERY_LAYER)),
        (gate, replace(add, gate=0)),
        (replace(add, span=Span(prompt=False)),),
        (replace(add, point="mlp_out"), Edit("map", "map", EVERY_LAYER, SMALL, LAST_PROMPT_TOKEN)),
    )
    return kinds[index % len(kinds)]


def operands() -> dict[str, tuple[str, Operand]]:
    """By bank key, with the point at which it is read."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    def at_every_layer(make: Any) -> Operand:
        return pack({layer: make() for layer in EVERY_LAYER})

    made: dict[str, tuple[str, Operand]] = {
        "map": (
            "resid_post",
            at_every_layer(lambda: {"left": normal(HIDDEN, 256), "right": normal(256, HIDDEN) / HIDDEN}),
        )
    }
    for index in range(REQUESTS):
        chosen = rng.choice(LAYERS * NEURONS, 100, replace=False)
        masks = np.zeros((LAYERS, NEURONS), np.float32)
        masks.reshape(-1)[chosen] = 1
        made[f"neurons-{index}"] = ("mlp_act", pack({layer: {"mask": masks[layer]} for layer in EVERY_LAYER}))
        made[f"vector-{index}"] = ("resid_post", at_every_layer(lambda: {"vector": normal(HIDDEN)}))
        features = {"encoder": normal(8, HIDDEN) / HIDDEN, "decoder": normal(8, HIDDEN), "threshold": np.full(8, 0.1)}
        made[f"features-{index}"] = ("resid_post", at_every_layer(lambda features=features: features))
    return made


def upload(llm: Any, key: str, point: str, operand: Operand) -> None:
    """Bring an operand into the bank, as the server's uploader does, but in this process."""
    core = llm.llm_engine.engine_core.engine_core
    (grant,) = core.polyhelm_reserve([[(key, point, operand.width, len(operand.data))]])
    serial = grant["uploads"][key]
    core.polyhelm_write(key, serial, 0, operand.data.astype("<f4").tobytes())
    assert core.polyhelm_bind(key, serial, operand.pieces) == "loaded"


def engine_child(pipe: Connection, model: str, steering: bool) -> None:
    """Answers each mode with tokens per second."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    engine: dict[str, Any] = {"model": model, "enforce_eager": True, "max_num_seqs": REQUESTS, "max_model_len": 1024}
    if steering:
        os.environ["POLYHELM_ENGINE"] = "1"
    from vllm import LLM, SamplingParams

    llm = LLM(**engine, enable_prefix_caching=False, seed=0)
    rng = np.random.default_rng(0)
    prompts = [{"prompt_token_ids": rng.integers(3, 40000, PROMPT_TOKENS).tolist()} for _ in range(REQUESTS)]
    for key, (point, operand) in operands().items() if steering else ():
        upload(llm, key, point, operand)
    runs = 0
    while (mode := pipe.recv()) is not None:
        params = []
        runs += 1
        for index in range(REQUESTS):
            program = Program(edits(mode, index))
            extra = {"polyhelm_program": program.wire, "polyhelm_receipt": f"{runs}-{index}".encode()}
            params.append(
                SamplingParams(
                    temperature=0,
                    max_tokens=TOKENS,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args=extra if program.edits else None,
                )
            )
        start = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        pipe.send(REQUESTS * TOKENS / (time.perf_counter() - start))
        if mode != "idle":
            check_touched(llm, runs, mode)


def check_touched(llm: Any, run: int, mode: str) -> None:
    """A fast run that steered nothing would be worth nothing."""
    names = [f"{run}-{index}" for index in range(REQUESTS)]
    (receipts,) = llm.collective_rpc("polyhelm_receipts", args=(names,))
    ran = PROMPT_TOKENS + TOKENS - 1
    for index, receipt in enumerate(receipts):
        program = Program(edits(mode, index))
        for edit, intervals, touched in zip(
            program.edits, program.intervals(PROMPT_TOKENS), receipt["touched"], strict=True
        ):
            expected = sum(min(end, ran) - start for start, end in intervals)
            if edit.gate is None:
                assert touched == [expected] * len(edit.layers), (mode, edit, touched)


def transformers_child(pipe: Connection, model: str, threads: int) -> None:
    """Tokens per second of one request at a time, a hook on every layer."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    for layer in lm.model.layers:
        vector = (1e-3 * torch.randn(HIDDEN)).to(torch.bfloat16)
        layer.register_forward_hook(
            lambda module, args, output, vector=vector: (
                (output[0] + vector, *output[1:]) if isinstance(output, tuple) else output + vector
            )
        )
    prompt = torch.randint(3, 40000, (1, PROMPT_TOKENS))
    while pipe.recv() is not None:
        start = time.perf_counter()
        lm.generate(prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        pipe.send(TOKENS / (time.perf_counter() - start))


def start(target: Any, *args: Any) -> tuple[Any, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *args))
    process.start()
    return process, ours


def ask(pipe: Any, mode: str) -> float:
    pipe.send(mode)
    return float(pipe.recv())


def throughput(model: str, rounds: int) -> dict[str, Any]:
    """Ratios to plain vLLM by mode, and tokens/s of everything."""
    children = {"plain": start(engine_child, model, False), "polyhelm": start(engine_child, model, True)}
    children["transformers"] = start(transformers_child, model, int(os.environ.get("OMP_NUM_THREADS", "1")))
    pipes = {name: pipe for name, (_, pipe) in children.items()}
    for mode in MODES:
        ask(pipes["polyhelm"], mode)
    before = ask(pipes["plain"], "idle")
    seen: dict[str, list[float]] = {"plain": [], **{mode: [] for mode in MODES}, "transformers": []}
    ratios: dict[str, list[float]] = {mode: [] for mode in MODES}
    for number in range(rounds):
        # Each round in another order, so that no mode always follows the same one.
        order = [*MODES]
        for mode in order[number % len(order) :] + order[: number % len(order)]:
            speed = ask(pipes["polyhelm"], mode)
            after = ask(pipes["plain"], "idle")
            ratios[mode].append(speed / ((before + after) / 2))
            seen[mode].append(speed)
            seen["plain"].append(after)
            before = after
        seen["transformers"].append(ask(pipes["transformers"], "one"))
        print(
            f"round {number + 1}/{rounds}: " + ", ".join(f"{mode} {ratios[mode][-1]:.3f}" for mode in MODES), flush=True
        )
    for process, pipe in children.values():
        pipe.send(None)
        process.join()
    against = [s / t for s, t in zip(seen["all layers"], seen["transformers"], strict=True)]
    return {
        "ratio_to_plain": {mode: spread(values) for mode, values in ratios.items()},
        "tokens_per_second": {name: spread(values) for name, values in seen.items()},
        "all_layers_to_transformers": spread(against),
    }


def admission(model: str) -> dict[str, Any]:
    """Host milliseconds to admit one steered request: in the API process, in the engine's, and in the worker."""
    from safetensors.numpy import save

    from server.api.doses import Doses
    from server.api.leases import Leases
    from server.api.served import ServedModel
    from server.api.steering import Steerer
    from server.engine.banks import Bank
    from server.engine.edits import OPCODES
    from server.engine.ops.tables import Tables
    from server.engine.routing import BatchView, Router
    from steering_store import Store

    identity = model_identity(model)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        vectors = {f"resid_post.{layer}": np.ones(HIDDEN, np.float32) for layer in range(LAYERS)}
        site = {"point": "resid_post", "file": "v.safetensors", "shape": [HIDDEN], "dtype": "F32"}
        manifest = {
            "schema_version": 1,
            "kind": "steering_vector",
            "model": {key: identity[key] for key in ("architecture", "hidden_size", "num_layers", "weights_digest")},
            "sites": [{**site, "layer": layer, "tensor": f"resid_post.{layer}"} for layer in range(LAYERS)],
            "default_strength": 1.0,
            "provenance": {"method": "benchmark"},
        }
        store.publish("bench", manifest, {"v.safetensors": save(vectors)})
        points = {"resid_post": {"width": HIDDEN, "opcodes": OPCODES}}
        served = ServedModel(identity, LAYERS, HIDDEN, points, "weights")
        steerer = Steerer(store, served, 16, 1e4, Doses(None), Leases(store))
        field = {"interventions": [{"artifact": "bench", "strength": 2.0, "apply": {"generation": "all"}}]}
        prepare = timed(lambda: steerer.prepare(field))
        program = steerer.prepare(field).program

    def tag_blocks() -> None:
        parsed = Program.from_wire(program.wire)
        intervals = parsed.intervals(200)
        for start in range(0, 256, 32):
            parsed.block_tag(intervals, start, start + 32)

    operand = pack({layer: {"vector": np.ones(HIDDEN, np.float32)} for layer in EVERY_LAYER})
    bank = Bank(len(operand.data))
    bank.write(0, operand.data.tobytes())
    bank.bind(program.operands[0], 0, HIDDEN, operand.pieces)
    widths = dict.fromkeys(EVERY_LAYER, HIDDEN)
    router = Router(Tables(bank, len(POINTS) * LAYERS, widths, max_rows=32, max_tokens=64), LAYERS)
    for index in range(REQUESTS - 1):
        router.admit(f"r{index}", program, f"r{index}", None, 8)
    ids = [f"r{index}" for index in range(REQUESTS)]

    def admit_and_route() -> None:
        router.admit(ids[-1], program, "last", None, 8)
        router.route(BatchView(ids, [1] * REQUESTS, [20] * REQUESTS))
        router.release(ids[-1])

    parts = {"api": prepare, "engine core": timed(tag_blocks), "worker": timed(admit_and_route)}
    return {**parts, "total_median_ms": sum(part["median"] for part in parts.values())}


def timed(call: Any, runs: int = 2000) -> dict[str, float]:
    call()
    times = []
    for _ in range(runs):
        start_time = time.perf_counter()
        call()
        times.append((time.perf_counter() - start_time) * 1e3)
    return spread(times)


def page(results: dict[str, Any]) -> str:
    """docs/performance.md."""
    env, speed = results["environment"], results["throughput"]
    ratio, tokens, host = speed["ratio_to_plain"], speed["tokens_per_second"], results["admission_ms"]

    def cell(value: dict[str, float], digits: int) -> str:
        return f"{value['median']:.{digits}f} ({value['quartile_1']:.{digits}f}–{value['quartile_3']:.{digits}f})"

    rows = [
        f"| polyhelm: {label} | {cell(tokens[mode], 0)} | {cell(ratio[mode], 3)} | {goal} |"
        for mode, (label, goal) in MODES.items()
    ]
    return "\n".join(
        [
            "# What steering costs",
            "",
            f"SmolLM2-135M in bfloat16, {REQUESTS} concurrent requests of {PROMPT_TOKENS} + {TOKENS} "
            "tokens, vLLM on CPU in eager mode. Plain vLLM and polyhelm took turns in one run; a ratio is one polyhelm "
            "run over the mean of the plain runs just before and after it. Median (quartiles).",
            "",
            "| | tokens/s | ratio to plain vLLM | goal |",
            "|---|---|---|---|",
            f"| plain vLLM | {cell(tokens['plain'], 0)} | 1 | |",
            *rows,
            f"| transformers, hook on every layer, one request at a time | {cell(tokens['transformers'], 1)} | | |",
            "",
            "Steered at all layers against transformers: "
            f"{cell(speed['all_layers_to_transformers'], 1)} times (goal: 10).",
            "",
            "Host time to admit one steered request, 15 others running (ms, median and quartiles): "
            f"API {cell(host['api'], 3)}, engine core {cell(host['engine core'], 3)}, "
            f"worker {cell(host['worker'], 3)}; together {host['total_median_ms']:.3f} (goal: 0.3).",
            "",
            "On CPUs polyhelm's engine processes sleep while they wait for each other, where vLLM's spin for up to a "
            "second: on few cores that leaves time to the model and to those that answer requests.",
            "",
            "On a GPU the speed is unmeasured: none was at hand. `benchmarks/gpu_overhead.py` measures it.",
            "",
            f"Measured {describe(env)}. Run it yourself: "
            "`make bench-setup && .venv/bin/python benchmarks/engine_overhead.py`.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--data-dir", type=Path, default=Path("polyhelm-data"))
    parser.add_argument("--dry", action="store_true", help="Print the results, write nothing.")
    args = parser.parse_args()
    model = resolve_model("smollm2", args.data_dir, print).path
    results = {
        "environment": environment(),
        "throughput": throughput(model, args.rounds),
        "admission_ms": admission(model),
    }
    print(json.dumps(results, indent=2))
    if not args.dry:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=2) + "\n")
        PAGE.write_text(page(results))


if __name__ == "__main__":
    main()
