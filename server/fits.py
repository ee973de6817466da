"""Fits an artifact on the served model: capture, fit, publish. The same for the HTTP job, the command line and the
demo; what differs between the methods is in fit_methods/.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi.concurrency import run_in_threadpool
from safetensors.numpy import save

from server import __version__
from server.api.errors import ApiError
from server.engine.capture import CaptureSpec, pooling_span
from server.engine.edits import Point
from server.engine.spans import Span
from server.fit_methods.base import Activations, Array, FitError, Fitted, MethodSpec, ModelShape, Progress, Wanted
from server.models import ModelIdentity
from steering_store import Publication, Store
from steering_store.manifest import DType, Kind

if TYPE_CHECKING:
    from server.engine.client import CaptureRun, Engine

CONCURRENT_CAPTURES = 32
FILES: dict[Kind, str] = {
    "steering_vector": "vectors.safetensors",
    "neuron_set": "neurons.safetensors",
    "linear_map": "maps.safetensors",
    "sae": "sae.safetensors",
}
"""The file that a fit's tensors are in."""

_DTYPES: dict[str, DType] = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32"}


def model_shape(engine: Engine) -> ModelShape:
    widths: dict[Any, int] = {point: int(each["width"]) for point, each in engine.points.items() if each["width"]}
    return ModelShape(engine.layers, engine.heads, widths)


async def check_spec(spec: MethodSpec, engine: Engine) -> list[list[int]]:
    """The token ids of all texts. ApiError 422 naming the first text or option that the model can't take, or 400 where
    this server can't capture what the method reads.
    """
    _check_points(spec.wanted().points, engine)
    layers = engine.layers
    if bad := [layer for layer in spec.options.default_layers or () if layer >= layers]:
        raise ApiError(422, f"default_layers {bad} are outside the model's {layers} layers", "options.default_layers")
    texts = spec.texts()
    encoded: list[list[int]] = await run_in_threadpool(
        lambda: engine.tokenizer([each.text for each in texts])["input_ids"]
    )
    least, most = 2 if spec.wanted().keep == "mean" else 1, engine.max_model_len - 1
    for (where, _), ids in zip(texts, encoded, strict=True):
        if not least <= len(ids) <= most:
            raise ApiError(422, f"{where}: {len(ids)} tokens; this model and pooling take {least} to {most}", where)
    return encoded


def _check_points(points: Sequence[Point], engine: Engine) -> None:
    if engine.captures is not None:
        raise ApiError(400, f"fitting needs captured activations: {engine.captures}")
    for point in points:
        if not (known := engine.points.get(point, {})).get("width"):
            reason = known.get("reason") or "it isn't installed: name it in POLYHELM_POINTS"
            raise ApiError(400, f"the method reads {point}, where this server captures nothing: {reason}", "options")


async def run_fit(
    spec: MethodSpec,
    engine: Engine,
    store: Store,
    identity: ModelIdentity,
    created_at: datetime,
    progress: Progress,
    annotations: Mapping[str, str] | None = None,
) -> Publication:
    """Capture what the method wants of every text in one pass, fit, and publish. Raises ApiError or StoreError."""
    ids = await check_spec(spec, engine)
    activations = await _capture(ids, spec.wanted(), engine, progress)
    try:
        fitted = await run_in_threadpool(spec.fit, activations, model_shape(engine), progress)
    except FitError as error:
        raise ApiError(422, str(error), error.field) from error
    except ValueError as error:
        raise ApiError(422, str(error), "options") from error
    manifest = _manifest(spec, fitted, activations, identity, engine, created_at)
    manifest["annotations"] = {**fitted.annotations, **(annotations or {})}
    tensors = {_tensor_name(fitted, *key): np.ascontiguousarray(tensor) for key, tensor in fitted.tensors.items()}
    return await run_in_threadpool(store.publish, spec.name, manifest, {FILES[fitted.kind]: save(tensors)})


async def _capture(texts: list[list[int]], wanted: Wanted, engine: Engine, progress: Progress) -> Activations:
    sites = tuple((point, layer) for point in wanted.points for layer in range(engine.layers))
    span = Span(generation=False) if wanted.keep == "rows" else pooling_span(wanted.keep)
    spec = CaptureSpec(sites, span, "rows" if wanted.keep == "rows" else "mean")
    runs: list[dict[Point, tuple[Array, Array]] | None] = [None] * len(texts)
    slots = asyncio.Semaphore(CONCURRENT_CAPTURES)
    done = 0
    progress(done, len(texts))

    async def capture(index: int) -> None:
        nonlocal done
        async with slots:
            run = await engine.run_capture(texts[index], spec, detokenize=False)
        runs[index] = {point: _stacked(run, point, engine.layers, wanted) for point in wanted.points}
        done += 1
        progress(done, len(texts))

    async with asyncio.TaskGroup() as group:
        for index in range(len(texts)):
            group.create_task(capture(index))
    return await run_in_threadpool(_activations, [run for run in runs if run is not None], wanted)


def _stacked(run: CaptureRun, point: Point, layers: int, wanted: Wanted) -> tuple[Array, Array]:
    """The activations [layers, width] or [layers, tokens, width], and their mean L2 norm [layers], float32."""
    names = [f"{point}.{layer}" for layer in range(layers)]
    values: Array = np.stack([run.tensors[name].numpy() for name in names])
    if wanted.keep == "rows":
        return values, np.linalg.norm(values, axis=2).mean(1)
    return values, np.stack([run.tensors[f"{name}.norm"].numpy() for name in names])


def _activations(runs: Sequence[Mapping[Point, tuple[Array, Array]]], wanted: Wanted) -> Activations:
    values = {point: [run[point][0] for run in runs] for point in wanted.points}
    return Activations(
        pooled={} if wanted.keep == "rows" else {point: np.stack(values[point]) for point in wanted.points},
        rows=values if wanted.keep == "rows" else {},
        norms={point: np.mean([run[point][1] for run in runs], axis=0) for point in wanted.points},
    )


def _tensor_name(fitted: Fitted, layer: int, role: str | None) -> str:
    return f"{fitted.point}.{layer}" + (f".{role}" if role else "")


def _manifest(
    spec: MethodSpec,
    fitted: Fitted,
    activations: Activations,
    identity: ModelIdentity,
    engine: Engine,
    created_at: datetime,
) -> dict[str, Any]:
    shape = model_shape(engine)
    return {
        "schema_version": 1,
        "kind": fitted.kind,
        "description": spec.description,
        "model": {
            "architecture": identity["architecture"] or engine.architecture,
            "hidden_size": engine.hidden_size,
            "num_layers": engine.layers,
            "widths": _own_widths(fitted.point, shape),
            "weights_digest": identity["weights_digest"],
            "tokenizer_digest": identity["tokenizer_digest"],
            "name": engine.model_name,
        },
        "sites": [
            {
                "point": fitted.point,
                "layer": layer,
                "role": role,
                "file": FILES[fitted.kind],
                "tensor": _tensor_name(fitted, layer, role),
                "shape": list(tensor.shape),
                "dtype": _DTYPES[str(tensor.dtype)],
            }
            for (layer, role), tensor in fitted.tensors.items()
        ],
        "activation": fitted.activation,
        "default_strength": fitted.default_strength,
        "strength_range": fitted.strength_range,
        "default_layers": list(fitted.default_layers),
        "h_norm": {str(layer): float(norm) for layer, norm in enumerate(activations.norms.get(fitted.point, ()))},
        "languages": list(fitted.languages) or spec.languages,
        "provenance": {
            "method": spec.method,
            "config": dict(fitted.config),
            "data": {
                "name": spec.data.name,
                "sha256": spec.data_digest(),
                "rows": len(spec.items),
                "license": spec.data.license,
            },
            "code_version": __version__,
            "seed": fitted.seed,
            "created_at": created_at.isoformat(),
            "parents": list(fitted.parents),
        },
        "metrics": dict(fitted.metrics),
        "license": spec.license,
    }


def _own_widths(point: Point, shape: ModelShape) -> dict[str, int] | None:
    """Of the points where an activation's width isn't the hidden size, the one that the artifact acts at."""
    return {point: shape.widths[point]} if point in ("head_out", "mlp_act") else None
