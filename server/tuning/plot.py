"""Draws the curve of a tuning: effect against fluency, and effect by strength and layers. Needs matplotlib."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steering_store.tuning import Tuning, TuningPoint


def write_jsonl(tuning: Tuning, file: Path) -> None:
    """The baseline and every point as JSON lines; the chosen one says so."""
    rows: list[dict[str, Any]] = [{"baseline": True, **tuning.baseline.model_dump(mode="json", exclude_none=True)}]
    for number, point in enumerate(tuning.points):
        rows.append({**point.model_dump(mode="json", exclude_none=True), "chosen": number == tuning.chosen})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def series(tuning: Tuning) -> dict[str, list[TuningPoint]]:
    """The points of each set of layers and options, by rising strength; what they share isn't named."""
    found: dict[str, list[TuningPoint]] = {}
    for point in tuning.points:
        found.setdefault(_named(point), []).append(point)
    return {name: sorted(points, key=lambda point: point.strength) for name, points in found.items()}


def draw(tuning: Tuning, title: str, file: Path) -> bool:
    """As PNG; False where matplotlib isn't installed."""
    if find_spec("matplotlib") is None:
        return False
    drawn(tuning, title).savefig(file, dpi=120)
    return True


def drawn(tuning: Tuning, title: str) -> Any:
    """The picture, a figure of matplotlib's: at its left effect against fluency, at its right the heat map."""
    from matplotlib.figure import Figure

    lines = series(tuning)
    figure = Figure(figsize=(11, 4 + 0.15 * len(lines)), layout="constrained")
    figure.suptitle(f"{title}: {tuning.objective} on {tuning.data} ({', '.join(tuning.split)}, {tuning.rows} items)")
    fluency, heat = figure.subplots(1, 2)
    _fluency(fluency, tuning, lines)
    _heat(figure, heat, tuning, lines)
    return figure


def _fluency(axes: Any, tuning: Tuning, lines: dict[str, list[TuningPoint]]) -> None:
    baseline, best = tuning.baseline, tuning.best
    for name, points in lines.items():
        known = [point for point in points if point.perplexity is not None]
        axes.plot([p.perplexity for p in known], [p.effect for p in known], marker=".", label=name)
    if baseline.perplexity is not None:
        axes.plot([baseline.perplexity], [baseline.effect], marker="*", color="black", ls="", ms=12, label="unsteered")
        axes.axvline(tuning.max_perplexity_ratio * baseline.perplexity, color="grey", ls=":", lw=1)
    axes.plot([best.perplexity], [best.effect], marker="o", ms=12, mfc="none", color="black", ls="", label="chosen")
    axes.set(xscale="log", xlabel="perplexity of continuations, unsteered model", ylabel=tuning.objective)
    if len(lines) <= 12:
        axes.legend(fontsize="small")


def _heat(figure: Any, axes: Any, tuning: Tuning, lines: dict[str, list[TuningPoint]]) -> None:
    strengths = sorted({point.strength for point in tuning.points})
    rows = [{point.strength: point for point in points} for points in lines.values()]
    grid = [[row[each].effect if each in row else float("nan") for each in strengths] for row in rows]
    image = axes.imshow(grid, aspect="auto")
    for y, row in enumerate(rows):
        for x, strength in enumerate(strengths):
            if strength in row and not row[strength].fluent:
                axes.text(x, y, "x", ha="center", va="center", color="red")
            elif row.get(strength) is tuning.best:
                axes.text(x, y, "o", ha="center", va="center", color="white", weight="bold")
    axes.set_xticks(range(len(strengths)), [f"{each:g}" for each in strengths])
    axes.set_yticks(range(len(rows)), list(lines))
    axes.set(xlabel="strength (x: not fluent, o: chosen)")
    figure.colorbar(image, ax=axes, label=tuning.objective)


def _named(point: TuningPoint) -> str:
    options = " ".join(f"{name}={value}" for name, value in point.options.items())
    return f"layers {_ranges(point.layers)} {options}".strip()


def _ranges(layers: list[int]) -> str:
    if len(layers) > 1 and layers == list(range(layers[0], layers[-1] + 1)):
        return f"{layers[0]}-{layers[-1]}"
    return ",".join(map(str, layers))
