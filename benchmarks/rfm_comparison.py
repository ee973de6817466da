"""Is our Recursive Feature Machine as good as that of its authors, the package xrfm?

Both look for a planted direction u of [samples, width], with the same kernel, bandwidths, iterations, ridge and
held-out fifth: linear concepts (positive samples are shifted along u) and even ones (positive where (x . u)^2 is large,
so that the means agree). Told are |cos| with u of each, |cos| between the two, the AUC of the chosen predictors on the
held-out fifth, and the time. Writes results/rfm_comparison.json and a section of docs/results.md; exits with 1 where
ours is more than 0.05 further from u than xrfm's on average over the seeds of any problem.

    .venv/bin/python benchmarks/rfm_comparison.py
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from environment import describe, environment
from results_page import publish
from xrfm.rfm_src.kernels import LaplaceKernel
from xrfm.rfm_src.recursive_feature_machine import RFM

from methods import rfm

WIDTHS, SAMPLES, SEEDS = (16, 64, 256), 300, 3
MARGIN = 0.05
CONFIG = rfm.Config()


class Problem(NamedTuple):
    """Samples of both sides, and the direction that tells them apart."""

    positive: np.ndarray
    negative: np.ndarray
    u: np.ndarray


class Found(NamedTuple):
    direction: np.ndarray
    auc: float
    seconds: float


def problem(kind: str, width: int, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    u = rng.standard_normal(width)
    u /= np.linalg.norm(u)
    x = rng.standard_normal((SAMPLES, width)).astype(np.float32)
    if kind == "linear":
        sides = rng.random(SAMPLES) < 0.5
        x[sides] += (2 * u).astype(np.float32)
    else:
        x += (x @ u)[:, None] * u.astype(np.float32)  # twice as wide along u
        sides = (x @ u) ** 2 > 2.0
    return Problem(x[sides], x[~sides], u)


def ours(given: Problem) -> Found:
    started = time.perf_counter()
    fit = rfm.fit(given.positive, given.negative, CONFIG)
    return Found(fit.direction, fit.auc, time.perf_counter() - started)


def theirs(given: Problem) -> Found:
    """The same search over bandwidths and centring by the AUC on the same samples; among iterations xrfm goes by the
    mean squared error there, as its AUC is for classes only.
    """
    started = time.perf_counter()
    samples = np.concatenate([given.positive, given.negative]).astype(np.float64)
    labels = np.repeat([1.0, 0.0], [len(given.positive), len(given.negative)])
    held_out = np.concatenate(
        [np.arange(len(side)) % rfm.HELD_OUT == rfm.HELD_OUT - 1 for side in (given.positive, given.negative)]
    )
    median = rfm._median_distance(samples[~held_out])
    parts = [(torch.tensor(samples[each]), torch.tensor(labels[each, None])) for each in (~held_out, held_out)]
    best: tuple[float, np.ndarray] | None = None
    for multiple, centred in product(CONFIG.bandwidths, CONFIG.centred):
        model = RFM(
            LaplaceKernel(multiple * median, 1.0),
            iters=CONFIG.iterations,
            device="cpu",
            verbose=False,
            tuning_metric="mse",
            agop_power=1.0,
        )
        mean = labels[~held_out].mean()
        train = (parts[0][0], parts[0][1] - mean)
        validation = (parts[1][0], parts[1][1] - mean)
        model.fit(train, validation, reg=CONFIG.ridge, center_grads=centred, verbose=False, get_agop_best_model=True)
        scores = model.predict(parts[1][0]).cpu().numpy().ravel()
        auc = rfm.auc(scores, labels[held_out])
        if best is None or auc > best[0]:
            best = auc, model.agop_best_model.cpu().numpy()
    assert best is not None
    return Found(np.linalg.eigh(best[1])[1][:, -1], best[0], time.perf_counter() - started)


def rows() -> Iterator[dict[str, Any]]:
    for kind, width, seed in product(("linear", "even"), WIDTHS, range(SEEDS)):
        given = problem(kind, width, seed)
        mine, other = ours(given), theirs(given)
        row = {
            "concept": kind,
            "width": width,
            "seed": seed,
            "cosine": abs(float(mine.direction @ given.u)),
            "cosine_xrfm": abs(float(other.direction @ given.u)),
            "cosine_between": abs(float(mine.direction @ other.direction)),
            "auc": mine.auc,
            "auc_xrfm": other.auc,
            "seconds": mine.seconds,
            "seconds_xrfm": other.seconds,
        }
        print({name: round(each, 3) if isinstance(each, float) else each for name, each in row.items()}, flush=True)
        yield row


def section(results: dict[str, Any]) -> str:
    lines = []
    for kind, width in product(("linear", "even"), WIDTHS):
        those = [row for row in results["rows"] if (row["concept"], row["width"]) == (kind, width)]
        names = ("cosine", "cosine_xrfm", "cosine_between", "auc", "auc_xrfm")
        cells = [f"{np.mean([row[name] for row in those]):.3f}" for name in names]
        lines.append(f"| {kind} | {width} | {' | '.join(cells)} |")
    times = {name: np.median([row[name] for row in results["rows"]]) for name in ("seconds", "seconds_xrfm")}
    return f"""## Recursive feature machines: ours and the authors' package

`benchmarks/rfm_comparison.py`: a planted direction u in {results["samples"]} made-up samples, the same kernel,
bandwidths, iterations, ridge and held-out fifth in both; means of {SEEDS} seeds. `linear`: one side is shifted along u.
`even`: a side is what is far along u either way, so that the means agree. On average over the seeds ours is nowhere
more than {MARGIN} further from u than xrfm's: {"yes" if results["claim"]["holds"] else "no"}. A problem took
{times["seconds"]:.2f} s, with xrfm {times["seconds_xrfm"]:.2f} s.

| concept | width | cosine with u, ours | xrfm's | between the two | held-out AUC, ours | xrfm's |
|---|---:|---:|---:|---:|---:|---:|
{chr(10).join(lines)}

Measured {describe(results["environment"])}.
"""


def main() -> int:
    torch.manual_seed(0)
    found = list(rows())
    behind = {
        f"{kind} {width}": float(
            np.mean(
                [row["cosine_xrfm"] - row["cosine"] for row in found if (row["concept"], row["width"]) == (kind, width)]
            )
        )
        for kind, width in product(("linear", "even"), WIDTHS)
    }
    good = max(behind.values()) <= MARGIN
    results = {
        "environment": environment(),
        "samples": SAMPLES,
        "config": asdict(CONFIG),
        "claim": {"behind_by_at_most": MARGIN, "holds": good},
        "behind": behind,
        "rows": found,
    }
    publish("rfm_comparison", results, section(results))
    print(behind)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
