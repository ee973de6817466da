"""How many neurons do languages share, layer by layer, and how much of what the MLPs write is theirs?

Captures `mlp_act` at the last token of the same news sentences (NTREX-128) in ten languages, with the engine, and
reports the categories of methods/shared_neurons.py with the lengths of the down projections' columns. As a control,
languages' sentences are shuffled against each other: what is shared without a common meaning. Writes
results/shared_neurons.json.

    POLYHELM_BENCH_DATA=DATA .venv/bin/python benchmarks/shared_neurons.py --model polyhelm-data/models/gemma3-270m
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from environment import environment
from safetensors import safe_open

from methods.shared_neurons import CATEGORIES, Report, Tally

os.environ["POLYHELM_ENGINE"] = "1"  # before vllm is imported
os.environ.setdefault("POLYHELM_POINTS", "mlp_act")

RESULTS = Path(__file__).parent / "results" / "shared_neurons.json"
LANGUAGES = ("eng", "deu", "spa", "fra", "rus", "tha", "tur", "vie", "zho-CN", "swa")
"""The paper's nine, with Swahili for Portuguese."""
BATCH, FIRST = 32, 500
"""Sentences from 501 on: the first half is what other methods are fitted on."""


def sentences(folder: Path, language: str, count: int) -> list[str]:
    (file,) = folder.glob(f"newstest2019-*.{language}.txt")
    return file.read_text("utf-8").splitlines()[FIRST : FIRST + count]


def column_norms(model: Path) -> np.ndarray:
    """[layers, neurons]: of the down projections' columns. RuntimeError for a model that names them otherwise."""
    found: dict[int, np.ndarray] = {}
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                if name.endswith(".mlp.down_proj.weight"):
                    layer = int(name.split(".layers.")[1].split(".")[0])
                    found[layer] = tensors.get_tensor(name).float().norm(dim=0).numpy()
    if not found:
        raise RuntimeError(f"{model.name}: no tensor is named ...mlp.down_proj.weight")
    return np.stack([found[layer] for layer in range(len(found))])


def capture(model: str, texts: list[str], layers: int) -> np.ndarray:
    """[texts, layers, neurons] at the last token."""
    from vllm import LLM

    from server.engine.offline import activations

    llm = LLM(model, enforce_eager=True, max_model_len=512, max_num_seqs=BATCH, disable_log_stats=True)
    rows = []
    for start in range(0, len(texts), BATCH):
        found = activations(llm, texts[start : start + BATCH], {"points": ["mlp_act"], "layers": None}, "last")
        rows += [np.stack([each[f"mlp_act.{layer}"][0] for layer in range(layers)]) for each in found]
        print(f"captured {min(start + BATCH, len(texts))} of {len(texts)} texts", flush=True)
    return np.stack(rows)


def described(report: Report) -> dict[str, Any]:
    """By category where there is one, then by layer."""
    fields = {key: value for key, value in asdict(report).items() if isinstance(value, np.ndarray)}
    shaped = {
        key: dict(zip(CATEGORIES, np.round(fields[key], 4).tolist(), strict=True))
        for key in ("share", "top_share", "contribution", "repeating")
    }
    active = dict(zip(LANGUAGES, np.round(report.active, 4).tolist(), strict=True))
    means = {key: {name: float(np.mean(each)) for name, each in value.items()} for key, value in shaped.items()}
    return {"mean_over_layers": means, **shaped, "active": active}


def main() -> int:
    arguments = parsed()
    folder = arguments.data / "parallel" / "ntrex128"
    norms = column_norms(arguments.model)
    texts = [text for language in LANGUAGES for text in sentences(folder, language, arguments.inputs)]
    started = time.monotonic()
    x = capture(str(arguments.model), texts, len(norms)).reshape(len(LANGUAGES), arguments.inputs, *norms.shape)
    seconds = time.monotonic() - started
    tallies = {"parallel": Tally(norms), "shuffled": Tally(norms)}
    for index in range(arguments.inputs):
        others = [(index + 7 * language) % arguments.inputs for language in range(len(LANGUAGES))]
        tallies["parallel"].add(x[:, index])
        tallies["shuffled"].add(np.stack([x[language, other] for language, other in enumerate(others)]))
    results = {
        "environment": environment(),
        "model": arguments.model.name,
        "data": {"name": "NTREX-128", "first": FIRST + 1, "inputs": arguments.inputs, "languages": LANGUAGES},
        "layers": len(norms),
        "neurons": norms.shape[1],
        "capture_seconds": seconds,
        **{name: described(tally.report()) for name, tally in tallies.items()},
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    for name in tallies:
        print(name, json.dumps(results[name]["mean_over_layers"], indent=1))
    return 0


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("POLYHELM_BENCH_DATA", "data")))
    parser.add_argument("--inputs", type=int, default=100)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
