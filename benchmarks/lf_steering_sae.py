"""Does the SAE trainer make a usable SAE of a served model on a CPU, in minutes?

Captures every token of a text at one layer with the engine, in windows of 256 tokens; trains on the first four fifths
of the articles; and measures FVU and L0 on the last fifth, as trained and with the calibrated threshold that serving
uses. Attention sinks are left out: the first token of each window, and tokens ten times as long as the median one. They
would be most of the variance and flatter the FVU; `with_sinks` has the held-out numbers with the latter.

Writes results/lf_steering_sae.json, a section of docs/results.md and, in the work folder, the rows, the checkpoint and
the SAE; an interrupted run goes on from there. Exits with 1 unless the FVU is below 0.25 at an L0 of at most 64 on the
held-out text, in both forms.

    POLYHELM_BENCH_DATA=DATA .venv/bin/python benchmarks/lf_steering_sae.py --model polyhelm-data/models/smollm2 --work
    WORK
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import resource
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe, environment
from results_page import publish
from safetensors.numpy import save_file

from methods.sae import Quality, Sae, calibrated, ordinary, quality
from methods.sae_training import Config, Training, train
from server.models import model_identity

WINDOW, BATCH = 256, 64
FVU, L0 = 0.25, 64


def articles(text: str) -> list[str]:
    """Of WikiText: an article begins with a line ` = Title = `."""
    return [part for part in re.split(r"(?m)^(?= = [^=].*[^=] = $)", text) if part.strip()]


def capture(model: Path, parts: list[list[str]], layer: int, files: list[Path]) -> None:
    """Of each part, a list of texts, writes the rows [tokens, hidden], float32. In a process of its own: the engine's
    memory isn't the training's.
    """
    from local_model import LocalModel

    from server.engine.offline import activations

    loaded, site, started = LocalModel(model, max_model_len=WINDOW + 1), f"resid_post.{layer}", time.monotonic()
    for texts, file in zip(parts, files, strict=True):
        encoded = [loaded.encode(text) for text in texts]
        windows = [ids[start : start + WINDOW] for ids in encoded for start in range(0, len(ids) - 1, WINDOW)]
        rows = []
        for start in range(0, len(windows), BATCH):
            found = activations(loaded.llm, windows[start : start + BATCH], [site], "all", memory_bytes=1 << 30)
            rows += [each[site][1:] for each in found]
            done = min(start + BATCH, len(windows))
            print(f"captured {done} of {len(windows)} windows in {time.monotonic() - started:.0f} s", flush=True)
        np.save(file, np.concatenate(rows), allow_pickle=False)


def captured(arguments: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Training and held-out rows, from the work folder where they are there."""
    kept = f"{model_identity(arguments.model)['weights_digest']}".partition(":")[2][:12] + f".{arguments.layer}"
    meta = arguments.work / f"rows.{kept}.json"
    files = [arguments.work / f"{part}.{kept}.npy" for part in ("train", "held_out")]
    if not meta.exists():
        texts = articles(arguments.text.read_text("utf-8"))
        cut = len(texts) * 4 // 5
        process = multiprocessing.get_context("spawn").Process(
            target=capture, args=(Path(arguments.model), [texts[:cut], texts[cut:]], arguments.layer, files)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"capturing ended with {process.exitcode}")
        meta.write_text(json.dumps({"articles": [cut, len(texts) - cut]}), "utf-8")
    return np.load(files[0], mmap_mode="r"), np.load(files[1], mmap_mode="r"), json.loads(meta.read_text("utf-8"))


def measure(sae: Sae, rows: np.ndarray) -> dict[str, float]:
    found: Quality = quality(sae, rows)
    return asdict(found)


def main() -> int:
    arguments = parsed()
    arguments.work.mkdir(parents=True, exist_ok=True)
    everything, tests, source = captured(arguments)
    rows, held_out = everything[ordinary(everything)], tests[ordinary(tests)]
    config = Config(
        features=arguments.features,
        k=arguments.k,
        architecture=arguments.architecture,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
    )
    started = time.monotonic()
    training: Training = train(
        rows,
        config,
        checkpoint=arguments.work / f"checkpoint.{arguments.layer}.safetensors",
        checkpoint_every=200,
        progress=Steps(),
    )
    seconds = time.monotonic() - started
    served = calibrated(training.sae, rows[:: max(1, len(rows) // 20_000)])
    found = {
        "trained": {"train": measure(training.sae, rows[::8]), "held_out": measure(training.sae, held_out)},
        "served": {"train": measure(served, rows[::8]), "held_out": measure(served, held_out)},
    }
    good = all(each["held_out"]["fvu"] < FVU and each["held_out"]["l0"] <= L0 for each in found.values())
    tensors = {name: getattr(served, name) for name in ("encoder", "encoder_bias", "decoder", "decoder_bias")}
    save_file(tensors | {"threshold": served.threshold}, arguments.work / f"sae.{arguments.layer}.safetensors")
    results = {
        "environment": environment(),
        "model": Path(arguments.model).name,
        "site": f"resid_post.{arguments.layer}",
        "text": {"name": arguments.text.parent.name, **source, "train": len(rows), "held_out": len(held_out)},
        "sinks_left_out": {"train": len(everything) - len(rows), "held_out": len(tests) - len(held_out)},
        "config": asdict(config),
        "claim": {"fvu_below": FVU, "l0_at_most": L0, "holds": good},
        "quality": found,
        "with_sinks": {"trained": measure(training.sae, tests), "served": measure(served, tests)},
        "train_seconds_of_this_run": seconds,
        "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "curve": [point._asdict() for point in training.curve],
    }
    publish("lf_steering_sae", results, section(results))
    print(json.dumps(found, indent=1), f"{seconds:.0f} s")
    return 0 if good else 1


def section(results: dict[str, Any]) -> str:
    config, text, claim = results["config"], results["text"], results["claim"]
    lines = [
        f"| {form}, {part} | {row['fvu']:.3f} | {row['l0']:.1f} | {row['dead']:.1%} |"
        for form, parts in results["quality"].items()
        for part, row in (("training text", parts["train"]), ("held-out text", parts["held_out"]))
    ]
    return f"""## LF-Steering: the sparse auto-encoder

`benchmarks/lf_steering_sae.py`: {results["model"]}, {results["site"]}, {config["architecture"]} with
{config["features"]} features and k {config["k"]}, {config["steps"]} steps of {config["batch"]} on {text["train"]}
tokens of {text["name"]} ({text["articles"][0]} articles; {text["articles"][1]} held out), in
{results["train_seconds_of_this_run"]:.0f} s. Attention sinks are left out. `served` has the one threshold that stands
for the k largest. FVU below {claim["fvu_below"]} at an L0 of at most {claim["l0_at_most"]} on held-out text, in both
forms: {"yes" if claim["holds"] else "NO"}.

| | FVU | L0 | dead features |
|---|---:|---:|---:|
{chr(10).join(lines)}

Measured {describe(results["environment"])}.
"""


class Steps:
    """Prints how far the training is, and how long the rest takes."""

    def __init__(self) -> None:
        self._begun: tuple[int, float] | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._begun is None:
            self._begun = done, time.monotonic()
        elif done % 100 == 0 and done > self._begun[0]:
            left = (time.monotonic() - self._begun[1]) / (done - self._begun[0]) * (total - done)
            print(f"step {done} of {total}, about {left / 60:.1f} min left", flush=True)


def parsed() -> argparse.Namespace:
    data = Path(os.environ.get("POLYHELM_BENCH_DATA", "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the model")
    parser.add_argument("--work", type=Path, required=True, help="folder for rows, checkpoint and SAE")
    parser.add_argument("--text", type=Path, default=data / "corpora" / "wikitext2" / "test.txt")
    parser.add_argument("--layer", type=int, default=13)
    parser.add_argument("--features", type=int, default=4096)
    parser.add_argument("--k", type=int, default=56)
    parser.add_argument("--architecture", choices=["topk", "jumprelu"], default="topk")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
