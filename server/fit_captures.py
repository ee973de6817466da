"""Captures activations of texts on the served model, all of them in the running batch."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from fastapi.concurrency import run_in_threadpool

from server.api.errors import ApiError
from server.engine.capture import CaptureSpec, pooling_span
from server.engine.edits import Point
from server.engine.spans import Span
from server.fit_methods.base import Activations, Array, Capture, Progress, Wanted

if TYPE_CHECKING:
    from server.engine.client import CaptureRun, Engine

CONCURRENT_CAPTURES = 32


async def encoded(capture: Capture, engine: Engine) -> list[list[int]]:
    """The token ids of its texts. ApiError 422 naming the first text that the model can't take, and 400 where this
    server captures nothing at a point.
    """
    texts, wanted = capture
    _check_points(wanted.points, engine)
    if outside := [layer for layer in wanted.layers or () if layer >= engine.layers]:
        raise ApiError(422, f"layers {outside} are outside the model's {engine.layers} layers", "options.layer")
    found: list[list[int]] = await engine.tokenize([each.text for each in texts]) if texts else []
    least, most = 2 if wanted.keep == "mean" else 1, engine.max_model_len - 1
    for (where, _), ids in zip(texts, found, strict=True):
        if not least <= len(ids) <= most:
            raise ApiError(422, f"{where}: {len(ids)} tokens; this model and pooling take {least} to {most}", where)
    return found


def _check_points(points: Sequence[Point], engine: Engine) -> None:
    if engine.captures is not None:
        raise ApiError(400, f"fitting needs captured activations: {engine.captures}")
    for point in points:
        if not (known := engine.points.get(point, {})).get("width"):
            reason = known.get("reason") or "it isn't installed: name it in POLYHELM_POINTS"
            raise ApiError(400, f"the method reads {point}, where this server captures nothing: {reason}", "options")


async def captured(capture: Capture, engine: Engine, progress: Progress) -> Activations:
    """All that the capture wants, held in memory. ApiError as above."""
    wanted, texts = capture.wanted, await encoded(capture, engine)
    layers = {point: wanted.at(point, engine.layers) for point in wanted.points}
    sites = tuple((point, layer) for point in wanted.points for layer in layers[point])
    span = Span(generation=False) if wanted.keep == "rows" else pooling_span(wanted.keep)
    spec = CaptureSpec(sites, span, "rows" if wanted.keep == "rows" else "mean")
    runs: list[dict[Point, tuple[Array, Array]] | None] = [None] * len(texts)
    slots = asyncio.Semaphore(CONCURRENT_CAPTURES)
    done = 0
    progress(done, len(texts))

    async def run(index: int) -> None:
        nonlocal done
        async with slots:
            found = await engine.run_capture(texts[index], spec, detokenize=False)
        runs[index] = {point: _stacked(found, point, layers[point], wanted) for point in wanted.points}
        done += 1
        progress(done, len(texts))

    async with asyncio.TaskGroup() as group:
        for index in range(len(texts)):
            group.create_task(run(index))
    return await run_in_threadpool(_activations, [each for each in runs if each is not None], wanted, texts)


def _stacked(run: CaptureRun, point: Point, layers: Sequence[int], wanted: Wanted) -> tuple[Array, Array]:
    """The activations [layers, width] or [layers, tokens, width], and their mean L2 norm [layers], float32."""
    names = [f"{point}.{layer}" for layer in layers]
    values: Array = np.stack([run.tensors[name].numpy() for name in names])
    if wanted.keep == "rows":
        return values, np.linalg.norm(values, axis=2).mean(1)
    return values, np.stack([run.tensors[f"{name}.norm"].numpy() for name in names])


def _activations(
    runs: Sequence[Mapping[Point, tuple[Array, Array]]], wanted: Wanted, token_ids: Sequence[Sequence[int]]
) -> Activations:
    values = {point: [run[point][0] for run in runs] for point in wanted.points}
    return Activations(
        pooled={} if wanted.keep == "rows" else {point: np.stack(values[point]) for point in wanted.points},
        rows=values if wanted.keep == "rows" else {},
        norms={point: np.mean([run[point][1] for run in runs], axis=0) for point in wanted.points},
        token_ids=token_ids,
    )
