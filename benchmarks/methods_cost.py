"""What fitting costs, what capturing costs, and what each fitted artifact costs while serving.

Every method is fitted on states of the same 2 x --texts sentences of NTREX-128 (CC-BY-SA-4.0; German and English), each
in a process of its own with one thread, which says how long it took and by how much the most memory that it had was
above the states. Two engines, one without polyhelm, then take turns in one run: each run of polyhelm is divided by the
mean of the plain ones just before and after it, and compared with the goal that benchmarks/engine_overhead.py has for
such an edit. Capturing all layers is compared with plain vLLM's prefill of the same prompts, steered decoding with
plain decoding. LF-Steering chooses among the features of an SAE with random ones: what that costs doesn't depend on
them. Writes results/methods_cost.json and a section of docs/results.md. States, fits and finished rounds are kept in
--work, where an interrupted run goes on.

    POLYHELM_BENCH_DATA=DATA .venv/bin/python benchmarks/methods_cost.py --model polyhelm-data/models/smollm2 \\
        --work WORK
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_overhead import start, upload
from environment import describe, environment
from kept import Kept
from llvmlite.binding import ffi
from results_page import RESULTS, publish
from safetensors import safe_open
from safetensors.numpy import save_file
from spread import spread

from methods import caa, expertsteer, extractors, incline, lf_steering, sadi
from methods.sae import Sae
from methods.shared_neurons import Tally
from server.engine.edits import Edit, Function, Program
from server.engine.operands import Operand, pack
from server.engine.spans import Span
from server.model_weights import Mlps
from server.models import model_identity

STATES = ("resid_post", "head_out", "mlp_act")
POINTS = (*STATES, "attn_out", "resid_pre")
PROMPTS, PROMPT_TOKENS = 64, 128
REQUESTS, START_TOKENS, NEW_TOKENS = 16, 32, 64
HEADS, SAE_LAYER, SAE_FEATURES, SMALL = 9, 15, 4096, 1e-3
"""SMALL: a strength at which the text, and with it the work, stays that of the model."""
LAST_PROMPT_TOKEN = Span(prompt=False, generation=False, prompt_positions=(-1,))
CAPTURES = {
    "resid_post, last token": ("resid_post", "last"),
    "resid_post, mean of all tokens": ("resid_post", "mean"),
    "mlp_act, last token": ("mlp_act", "last"),
    "mlp_act and what its gates are worked out of, last token": ("mlp_act,resid_post,attn_out,resid_pre", "last"),
}
GOAL = 0.8

Tensors = dict[int, dict[Any, np.ndarray]]
Fitted = list[tuple[Edit, Tensors]]
"""What an artifact does, each edit with its operand by layer and role."""


def states(folder: Path, point: str, side: str) -> np.ndarray:
    """float32 [texts, layers, width]."""
    return np.load(folder / f"{point}.{side}.npy", allow_pickle=False)


def both(folder: Path, point: str) -> tuple[np.ndarray, np.ndarray]:
    return states(folder, point, "positive"), states(folder, point, "negative")


def fit_caa(folder: Path, options: argparse.Namespace) -> Callable[[], Fitted]:
    positive, negative = both(folder, "resid_post")

    def fit() -> Fitted:
        found = caa.fit(positive, negative, caa.Config())
        tensors = {layer: {"vector": found.vectors[layer]} for layer in found.default_layers}
        return [(Edit("add", "caa", tuple(tensors), SMALL), tensors)]

    return fit


def fit_direction(extractor: Any) -> Callable[[Path, argparse.Namespace], Callable[[], Fitted]]:
    def prepare(folder: Path, options: argparse.Namespace) -> Callable[[], Fitted]:
        positive, negative = both(folder, "resid_post")

        def fit() -> Fitted:
            found = extractors.extract(positive, negative, extractors.Config(extractor))
            tensors = {layer: {"vector": vector} for layer, vector in enumerate(found.vectors)}
            return [(Edit("add", extractor, tuple(tensors), SMALL), tensors)]

        return fit

    return prepare


def fit_sadi(component: Any) -> Callable[[Path, argparse.Namespace], Callable[[], Fitted]]:
    def prepare(folder: Path, options: argparse.Namespace) -> Callable[[], Fitted]:
        config = sadi.Config(component)
        positive, negative = both(folder, config.point)

        def fit() -> Fitted:
            found = sadi.fit(positive, negative, config, HEADS)
            masks = {layer: np.zeros(positive.shape[2], np.float32) for layer in sorted(found.indices)}
            for layer, indices in found.indices.items():
                masks[layer][indices] = 1
            tensors: Tensors = {layer: {"mask": mask} for layer, mask in masks.items()}
            return [
                (Edit("scale", f"sadi.{component}", tuple(tensors), SMALL, LAST_PROMPT_TOKEN, config.point), tensors)
            ]

        return fit

    return prepare


def fit_incline(folder: Path, options: argparse.Namespace) -> Callable[[], Fitted]:
    positive, negative = both(folder, "resid_post")

    def fit() -> Fitted:
        maps = incline.fit(positive, negative, incline.Config("de"))
        tensors: Tensors = {layer: {"matrix": each.dense} for layer, each in enumerate(maps)}
        bias: Tensors = {layer: {"vector": each.bias} for layer, each in enumerate(maps) if each.bias is not None}
        return [
            (Edit("map", "incline", tuple(tensors), SMALL, LAST_PROMPT_TOKEN), tensors),
            (Edit("add", "incline.bias", tuple(bias), SMALL, LAST_PROMPT_TOKEN), bias),
        ]

    return fit


def fit_lf_steering(folder: Path, options: argparse.Namespace) -> Callable[[], Fitted]:
    positive, negative = both(folder, "resid_post")
    width, rng = positive.shape[2], np.random.default_rng(0)
    rows = rng.standard_normal((SAE_FEATURES, width)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    zero = np.zeros(SAE_FEATURES, np.float32)
    sae = Sae("jumprelu", rows, zero, rows, np.zeros(width, np.float32), threshold=zero)

    def fit() -> Fitted:
        lf_steering.locate(positive[0::2], positive[1::2], np.arange(len(positive) // 2) % 2 == 0)
        features = lf_steering.select(sae, positive[:, SAE_LAYER], negative[:, SAE_LAYER], 0.0, 64)
        rows = lf_steering.delta_rows(sae, features)
        tensors = {"encoder": rows.encoder, "bias": rows.encoder_bias, "decoder": rows.decoder}
        function = Function("jumprelu")
        edit = Edit("rank", "lf_steering", (SAE_LAYER,), SMALL, function=function)
        return [(edit, {SAE_LAYER: tensors | {"threshold": rows.threshold}})]

    return fit


def fit_expertsteer(folder: Path, options: argparse.Namespace) -> Callable[[], Fitted]:
    positive, negative = both(folder, "resid_post")
    config = expertsteer.Config(pairs=3, mutual_information_texts=50)

    def fit() -> Fitted:
        found = expertsteer.self_expert(positive, negative, config)
        tensors = {layer: {"vector": vector} for layer, vector in sorted(found.vectors.items())}
        return [(Edit("add", "expertsteer", tuple(tensors), SMALL), tensors)]

    return fit


def fit_shared_neurons(folder: Path, options: argparse.Namespace) -> Callable[[], Fitted]:
    positive, negative = both(folder, "mlp_act")
    mlps = Mlps(str(options.model))
    norms = np.stack([mlps.layer(layer).writes for layer in range(mlps.layers)])

    def fit() -> Fitted:
        tally = Tally(norms)
        for index in range(len(positive)):
            tally.add(np.stack([positive[index], negative[index]]))
        masks = np.zeros(positive.shape[1:], np.float32)
        for layer, members in enumerate(tally.members("all_shared", 0.9)):
            masks[layer, members] = 1
        tensors: Tensors = {layer: {"mask": mask} for layer, mask in enumerate(masks)}
        return [(Edit("scale", "shared_neurons", tuple(tensors), SMALL, point="mlp_act"), tensors)]

    return fit


METHODS: dict[str, tuple[Callable[[Path, argparse.Namespace], Callable[[], Fitted]], str, float]] = {
    "caa": (fit_caa, "`add` at the middle third of the layers, every token", 0.96),
    "pca": (fit_direction("pca"), "", 0),
    "logistic": (fit_direction("logistic"), "", 0),
    "rfm": (fit_direction("rfm"), "`add` at all layers, every token", 0.96),
    "sadi, heads": (fit_sadi("heads"), "`scale` of the chosen heads, last prompt token", 0.97),
    "sadi, neurons": (fit_sadi("neurons"), "`scale` of the chosen neurons, last prompt token", 0.97),
    "incline": (fit_incline, "`map`, dense, and `add`, at all layers, last prompt token", 0.95),
    "lf_steering": (fit_lf_steering, "`rank`: 64 features, two rows each, at one layer, every token", 0.97),
    "expertsteer": (fit_expertsteer, "`add` at the chosen layers, every token", 0.96),
    "shared_neurons": (fit_shared_neurons, "`scale` of all-shared neurons of all layers, every token", 0.97),
}
"""How each is fitted, and what its artifact does; without a text it isn't served. The number is the engine's goal for
such an edit, benchmarks/engine_overhead.py's, or that of the nearest one there.
"""
IDLE_GOAL = 0.99


def fit_child(pipe: Connection, name: str, folder: Path, options: argparse.Namespace) -> None:
    """Answers seconds, MiB above what the states took, and the artifact."""
    torch.set_num_threads(1)
    fit = METHODS[name][0](folder, options)
    # A process's highest memory is its parent's, too, unless it is begun anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    started = time.monotonic()
    found = fit()
    seconds = time.monotonic() - started
    pipe.send((seconds, memory("VmHWM") - before, found))


def memory(name: str) -> float:
    """MiB of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text("utf-8").splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def engine_child(pipe: Connection, model: str, steering: bool, texts: dict[str, list[str]], folder: Path) -> None:
    """Answers tokens/s: of `("prefill",)`, `("capture", point, positions)`, `("decode", name)`; and does `("states",)`
    and `("upload", name, [(edit, operand)])`.
    """
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    if steering:
        os.environ |= {"POLYHELM_ENGINE": "1", "POLYHELM_POINTS": ",".join(POINTS)}
    from vllm import LLM, SamplingParams

    # vLLM reads the __dict__ of all that modules hold, and llvmlite's library makes a function of any name it is asked.
    ffi.lib._fntab["__dict__"] = {}
    llm = LLM(
        model,
        enforce_eager=True,
        max_num_seqs=32,
        max_model_len=1024,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=1 << 30,
        seed=0,
    )
    rng = np.random.default_rng(0)
    long = [rng.integers(3, 40000, PROMPT_TOKENS).tolist() for _ in range(PROMPTS)]
    short = [rng.integers(3, 40000, START_TOKENS).tolist() for _ in range(REQUESTS)]
    edits: dict[str, tuple[Edit, ...]] = {}
    runs = 0
    while (order := pipe.recv()) is not None:
        began = time.perf_counter()
        if order[0] == "states":
            _save_states(llm, texts, folder)
            pipe.send(0.0)
        elif order[0] == "upload":
            edits[order[1]] = tuple(edit for edit, _ in order[2])
            for edit, operand in order[2]:
                upload(llm, edit.operand, edit.point, operand)
            pipe.send(0.0)
        elif order[0] == "prefill":
            params = SamplingParams(max_tokens=1, temperature=0, detokenize=False)
            llm.generate([{"prompt_token_ids": ids} for ids in long], params, use_tqdm=False)
            pipe.send(PROMPTS * PROMPT_TOKENS / (time.perf_counter() - began))
        elif order[0] == "capture":
            from server.engine.offline import activations

            found = activations(llm, long, {"points": order[1].split(","), "layers": None}, order[2])
            speed = PROMPTS * PROMPT_TOKENS / (time.perf_counter() - began)
            assert len(found) == PROMPTS
            pipe.send(speed)
        else:
            runs += 1
            extra = {"polyhelm_program": Program(edits[order[1]]).wire} if order[1] else {}
            params = [
                SamplingParams(
                    max_tokens=NEW_TOKENS,
                    temperature=0,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args=extra | {"polyhelm_receipt": f"{runs}-{index}".encode()} if extra else None,
                )
                for index in range(REQUESTS)
            ]
            llm.generate([{"prompt_token_ids": ids} for ids in short], params, use_tqdm=False)
            speed = REQUESTS * NEW_TOKENS / (time.perf_counter() - began)
            if extra:
                (receipts,) = llm.collective_rpc("polyhelm_receipts", args=([f"{runs}-0"],))
                assert all(receipts[0]["touched"][0]), (order, receipts)
            pipe.send(speed)


def _save_states(llm: Any, texts: dict[str, list[str]], folder: Path) -> None:
    from server.engine.offline import activations

    for side, each in texts.items():
        for point in STATES:
            found = activations(llm, each, {"points": [point], "layers": None}, "last", memory_bytes=1 << 30)
            layers = len([name for name in found[0] if name.startswith(point)])
            rows = [np.stack([one[f"{point}.{layer}"][0] for layer in range(layers)]) for one in found]
            np.save(folder / f"{point}.{side}.npy", np.stack(rows))


def ask(pipe: Any, *order: Any) -> float:
    pipe.send(order)
    return float(pipe.recv())


def save_fitted(file: Path, found: Fitted) -> None:
    tensors = {
        f"{number} {layer} {role}": np.ascontiguousarray(tensor)
        for number, (_, by) in enumerate(found)
        for layer, roles in by.items()
        for role, tensor in roles.items()
    }
    save_file(tensors, file, {"edits": json.dumps([edit.to_json() for edit, _ in found])})


def load_fitted(file: Path) -> Fitted:
    with safe_open(file, "np") as stored:
        found: Fitted = [(Edit.from_json(each), {}) for each in json.loads(stored.metadata()["edits"])]
        for name in stored.keys():
            number, layer, role = name.split(" ")
            found[int(number)][1].setdefault(int(layer), {})[role] = stored.get_tensor(name)
    return found


def fit_cost(name: str, folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Leaves the artifact in the folder."""
    process, pipe = start(fit_child, name, folder, options)
    seconds, mebibytes, found = pipe.recv()
    process.join()
    save_fitted(folder / f"{name}.safetensors", found)
    size = sum(tensor.nbytes for _, by in found for roles in by.values() for tensor in roles.values())
    return {"seconds": seconds, "mebibytes": mebibytes, "artifact_mebibytes": size / 2**20}


def ratios(
    kept: Kept,
    kind: str,
    plain: Any,
    ours: Any,
    reference: tuple[str, ...],
    modes: dict[str, tuple[str, ...]],
    rounds: int,
) -> dict[str, Any]:
    """Of each mode to the mean of the plain runs just before and after it, and the plain tokens/s."""

    def measured(number: int) -> dict[str, Any]:
        before, found, speeds = ask(plain, *reference), {}, []
        order = [*modes]
        for name in order[number % len(order) :] + order[: number % len(order)]:
            speed = ask(ours, *modes[name])
            after = ask(plain, *reference)
            found[name] = speed / ((before + after) / 2)
            speeds.append(after)
            before = after
        print(", ".join(f"{name} {value:.3f}" for name, value in found.items()), flush=True)
        return {"ratio": found, "speeds": speeds}

    if any(f"{kind} {number}" not in kept for number in range(rounds)):
        for mode in modes.values():
            ask(ours, *mode)
        ask(plain, *reference)
    rows = [kept.part(f"{kind} {number}", lambda n=number: measured(n)) for number in range(rounds)]
    return {
        "plain_tokens_per_second": spread([speed for row in rows for speed in row["speeds"]]),
        "ratio": {name: spread([row["ratio"][name] for row in rows]) for name in modes},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    ntrex = options.data / "parallel" / "ntrex128"
    sides = {"positive": "newstest2019-ref.deu.txt", "negative": "newstest2019-src.eng.txt"}
    texts = {side: (ntrex / name).read_text("utf-8").splitlines()[: options.texts] for side, name in sides.items()}
    weights = str(model_identity(str(options.model))["weights_digest"]).partition(":")[2]
    folder = options.work / f"methods_cost.{weights[:12]}.{options.texts}"
    folder.mkdir(parents=True, exist_ok=True)
    decisive = {"captures": CAPTURES, "methods": [*METHODS]}
    kept = Kept(folder, "methods_cost", decisive, 1 + len(METHODS) + 2 * options.rounds)
    children = [start(engine_child, str(options.model), steering, texts, folder) for steering in (False, True)]
    try:
        found = measured(options, kept, folder, *(pipe for _, pipe in children))
    finally:
        for process, pipe in children:
            pipe.send(None)
            process.join()
    return {"model": options.model.name, "texts": options.texts, **found, "environment": environment()}


def measured(options: argparse.Namespace, kept: Kept, folder: Path, plain: Any, ours: Any) -> dict[str, Any]:
    def states_captured() -> float:
        started = time.monotonic()
        ask(ours, "states")
        return time.monotonic() - started

    capturing = kept.part("states", states_captured)
    costs = {name: kept.part(f"fit {name}", lambda n=name: fit_cost(n, folder, options)) for name in METHODS}
    captures = {key: ("capture", *each) for key, each in CAPTURES.items()}
    capture = ratios(kept, "capture", plain, ours, ("prefill",), captures, options.rounds)
    served = [name for name, (_, text, _) in METHODS.items() if text]
    for key in served:
        parts = load_fitted(folder / f"{key}.safetensors")
        packed: list[tuple[Edit, Operand]] = [(edit, pack(tensors)) for edit, tensors in parts]
        ask(ours, "upload", key, packed)
    steered = {"idle": ("decode", ""), **{key: ("decode", key) for key in served}}
    serving = ratios(kept, "serving", plain, ours, ("decode", ""), steered, options.rounds)
    return {
        "capture_seconds_of_all_points": capturing,
        "fits": costs,
        "capture": capture,
        "serving": serving,
    }


def section(results: dict[str, Any]) -> str:
    def cell(each: dict[str, float]) -> str:
        return f"{each['median']:.3f} ({each['quartile_1']:.3f}–{each['quartile_3']:.3f})"

    def goal(name: str) -> float:
        return METHODS[name][2] if name in METHODS else IDLE_GOAL

    fit_lines = [
        f"| {name} | {each['seconds']:.1f} | {each['mebibytes']:.0f} | {each['artifact_mebibytes']:.2f} |"
        for name, each in results["fits"].items()
    ]
    capture, serving = results["capture"], results["serving"]
    capture_lines = [f"| {name} | {cell(each)} |" for name, each in capture["ratio"].items()]
    serving_lines = [
        f"| {name} | {METHODS[name][1] if name in METHODS else 'nobody steered'} | {cell(each)} | {goal(name):g} |"
        for name, each in serving["ratio"].items()
    ]
    below = [name for name, each in serving["ratio"].items() if each["median"] < goal(name)]
    clearly = [name for name, each in serving["ratio"].items() if each["quartile_3"] < goal(name)]
    reached = all(each["median"] >= GOAL for each in capture["ratio"].values())
    sae = json.loads((RESULTS / "lf_steering_sae.json").read_text("utf-8"))
    return f"""## What the methods cost

`benchmarks/methods_cost.py`: {results["model"]}. Fitted on the states of {results["texts"]} German and
{results["texts"]} English sentences at all layers, one thread. Memory is what the fit takes above the states that it
is given; the artifact's size is that of its operand in float32. LF-Steering's numbers are for locating the layer and
choosing features; its SAE ({sae["config"]["features"]} features, {sae["text"]["train"]} tokens) took
{sae["train_seconds_of_this_run"]:.0f} s and {sae["peak_memory_gib"]:.1f} GiB in all (`benchmarks/lf_steering_sae.py`).
ExpertSteer's are for the model as its own expert, with 3 pairs of layers and mutual information over 50 texts.
Capturing all three points of all texts took {results["capture_seconds_of_all_points"]:.0f} s.

| method | fit, s | memory, MiB | artifact, MiB |
|---|---:|---:|---:|
{chr(10).join(fit_lines)}

Capturing all layers, tokens/s as a ratio to plain vLLM's prefill of the same {PROMPTS} prompts of {PROMPT_TOKENS}
tokens, which took turns with it (goal: {GOAL}, {"reached" if reached else "NOT reached everywhere"}); median and
quartiles of {capture["ratio"]["resid_post, last token"]["runs"]} runs:

| captured | ratio |
|---|---:|
{chr(10).join(capture_lines)}

Serving each fitted artifact, all of {REQUESTS} requests of {START_TOKENS} + {NEW_TOKENS} tokens steered, likewise;
other programs ran on the same machine, which widens the quartiles ([performance.md](performance.md) has a quiet one's):

| artifact | what it does | ratio to plain vLLM | the engine's goal |
|---|---|---:|---:|
{chr(10).join(serving_lines)}

Below the goal by the median: {", ".join(below) or "none"}; by the upper quartile, too: {", ".join(clearly) or "none"}.

Measured {describe(results["environment"])}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of SmolLM2")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("POLYHELM_BENCH_DATA", "data")))
    parser.add_argument("--work", type=Path, required=True, help="a folder to keep states, fits and rounds in")
    parser.add_argument("--texts", type=int, default=100, help="a side, to fit on; at least 40")
    parser.add_argument("--rounds", type=int, default=4)
    multiprocessing.set_start_method("spawn")
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    results = measure(parser.parse_args())
    publish("methods_cost", results, section(results))


if __name__ == "__main__":
    main()
