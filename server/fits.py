"""Fits an artifact on the served model: capture, fit, publish. The same for the HTTP job, the command line and the
demo; what differs between the methods is in fit_methods/.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi.concurrency import run_in_threadpool
from safetensors.numpy import save

from server import __version__
from server.api.errors import ApiError
from server.api.served import ServedModel
from server.engine.edits import Point
from server.experts import FindExpert, no_expert
from server.fit_captures import captured, encoded
from server.fit_methods.base import (
    Activations,
    Capture,
    Context,
    FitError,
    Fitted,
    MethodSpec,
    ModelShape,
    Progress,
    Steps,
)
from server.models import ModelIdentity
from server.tuning.measure import Task
from server.tuning.record import Record
from server.tuning.sweep import Sweep
from server.tuning.task import TuneError
from steering_store import Publication, Store
from steering_store.manifest import DType, Kind

if TYPE_CHECKING:
    from server.engine.client import Engine

TUNING = "tuning.jsonl"
LABELS = "labels.jsonl"
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


async def check_spec(spec: MethodSpec, engine: Engine) -> None:
    """ApiError 422 naming the first text or option that the model can't take, or an item of the tuning data that it
    must not be tuned on, and 400 where this server can't capture what the method reads.
    """
    layers = engine.layers
    if bad := [layer for layer in spec.options.default_layers or () if layer >= layers]:
        raise ApiError(422, f"default_layers {bad} are outside the model's {layers} layers", "options.default_layers")
    captures = spec.captures()
    for capture in captures:
        await encoded(capture, engine)
    if spec.tune is not None:
        try:
            spec.tune.check_unseen(text.text for capture in captures for text in capture.texts)
            await run_in_threadpool(Task.of, engine, spec.tune)
        except TuneError as error:
            raise ApiError(422, f"{error.field}: {error}", error.field) from error


async def run_fit(
    spec: MethodSpec,
    engine: Engine,
    store: Store,
    identity: ModelIdentity,
    created_at: datetime,
    progress: Progress,
    annotations: Mapping[str, str] | None = None,
    *,
    work: Path | None = None,
    expert: FindExpert = no_expert,
) -> Publication:
    """Capture what the method wants, fit, tune where that is asked for, and publish. Raises ApiError or StoreError.

    `work` is a folder of this fit's own, for what another attempt goes on from; it is removed once all is published.
    """
    if work is None:
        with TemporaryDirectory() as folder:
            return await run_fit(
                spec, engine, store, identity, created_at, progress, annotations, work=Path(folder), expert=expert
            )
    await check_spec(spec, engine)
    work.mkdir(parents=True, exist_ok=True)
    context = Context(
        model_shape(engine),
        progress,
        store,
        work,
        lambda ids: engine.tokenizer.decode(ids),
        expert,
        identity["weights_digest"],
        engine.model_path,
    )
    fit = _Fit(engine, identity, created_at, context, again=spec.tune is not None)
    if spec.tune is None:
        fitted = await fit(spec)
    else:
        served = ServedModel(identity, engine.layers, engine.hidden_size, engine.points, "weights")
        sweep = Sweep(spec, spec.tune, engine, store, served, fit, lambda each: fit.manifest(spec, each), named_tensors)
        fitted = await sweep.run(Record(work / TUNING, _identity(spec, identity)), progress)
    manifest = fit.manifest(spec, fitted)
    manifest["annotations"] = {**fitted.annotations, **(annotations or {})}
    files = {FILES[fitted.kind]: save(dict(named_tensors(fitted)))}
    if fitted.labels is not None:
        files[LABELS] = fitted.labels
    publication = await run_in_threadpool(store.publish, spec.name, manifest, files)
    await run_in_threadpool(shutil.rmtree, work)
    return publication


def _identity(spec: MethodSpec, identity: ModelIdentity) -> str:
    """Of everything that decides what a sweep measures."""
    decisive = [spec.model_dump(mode="json"), identity["weights_digest"], __version__]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


@dataclass
class _Fit:
    """Fits specs on one engine; what several of them want captured is captured once, if it is said that there will be
    several (`again`): a lot of memory else.
    """

    engine: Engine
    identity: ModelIdentity
    created_at: datetime
    context: Context
    again: bool
    _captured: dict[Capture, Activations] = field(default_factory=dict)
    _h_norm: dict[Point, dict[int, float]] = field(default_factory=dict)

    async def __call__(self, spec: MethodSpec) -> Fitted:
        steps, activations = spec.steps(self.context), None
        try:
            while isinstance(step := await run_in_threadpool(_advanced, steps, activations), Capture):
                activations = await self._capture(step)
            return step
        except FitError as error:
            raise ApiError(422, str(error), error.field) from error
        except ValueError as error:
            raise ApiError(422, str(error), "options") from error

    async def _capture(self, wanted: Capture) -> Activations:
        if wanted not in self._captured:
            found = await captured(wanted, self.engine, self.context.progress)
            for point, norms in found.norms.items():
                layers = wanted.wanted.at(point, self.engine.layers)
                self._h_norm.setdefault(point, {}).update(zip(layers, map(float, norms), strict=True))
            if not self.again:
                return found
            self._captured[wanted] = found
        return self._captured[wanted]

    def manifest(self, spec: MethodSpec, fitted: Fitted) -> dict[str, Any]:
        h_norm = self._h_norm.get(fitted.point, {})
        return _manifest(spec, fitted, h_norm, self.identity, self.engine, self.created_at)


def _advanced(steps: Steps, activations: Activations | None) -> Capture | Fitted:
    """The next capture that a fit wants, or its end."""
    try:
        return next(steps) if activations is None else steps.send(activations)
    except StopIteration as end:
        fitted: Fitted = end.value
        return fitted


def named_tensors(fitted: Fitted) -> dict[str, np.ndarray]:
    """As the artifact calls them."""
    return {_tensor_name(fitted, *key): np.ascontiguousarray(tensor) for key, tensor in fitted.tensors.items()}


def _tensor_name(fitted: Fitted, layer: int, role: str | None) -> str:
    return f"{fitted.point}.{layer}" + (f".{role}" if role else "")


def _manifest(
    spec: MethodSpec,
    fitted: Fitted,
    h_norm: Mapping[int, float],
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
            "revision": identity.get("revision"),
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
        "labels": None if fitted.labels is None else LABELS,
        "default_features": fitted.default_features,
        "tuning": None if fitted.tuning is None else fitted.tuning.model_dump(mode="json", exclude_none=True),
        "default_strength": fitted.default_strength,
        "strength_range": fitted.strength_range,
        "default_layers": list(fitted.default_layers),
        "h_norm": {str(layer): norm for layer, norm in sorted(h_norm.items())},
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
