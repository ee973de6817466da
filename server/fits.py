"""Fits an artifact on the served model: capture, fit, publish. The same for the HTTP job, the command line and the
demo.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, field_validator
from safetensors.numpy import save

from methods import caa
from server import __version__
from server.api.errors import ApiError
from server.models import ModelIdentity
from steering_store import Publication, Store
from steering_store.manifest import Language

if TYPE_CHECKING:
    from server.engine.client import Engine

Method = Literal["caa"]
CONCURRENT_CAPTURES = 32
Progress = Callable[[int, int], None]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1_000_000)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Pair(_Part):
    """Two texts that differ in the property to steer: more of it, less of it."""

    positive: Text
    negative: Text


class CaaOptions(_Part):
    """See methods/caa.py."""

    variant: caa.Variant = "mean_difference"
    pooling: caa.Pooling = "last"
    default_layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
    default_strength: FiniteFloat = 1.0

    @field_validator("default_layers")
    @classmethod
    def _each_once(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and len(set(layers)) < len(layers):
            raise ValueError("a layer is named twice")
        return layers


class Data(_Part):
    """Where the pairs come from, for the artifact's provenance."""

    name: Annotated[str, StringConstraints(min_length=1)] = "uploaded pairs"
    license: str | None = None


class FitSpec(_Part):
    """What to fit, from what, and the name to publish it under."""

    method: Method
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    pairs: Annotated[list[Pair], Field(min_length=2)]
    options: CaaOptions = CaaOptions()
    data: Data = Data()
    description: str = ""
    license: str | None = None
    languages: list[Language] = []


def data_digest(pairs: Sequence[Pair]) -> str:
    """SHA-256 (hex) of the pairs in canonical form."""
    rows = [[pair.positive, pair.negative] for pair in pairs]
    return hashlib.sha256(json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()


async def tokenize(spec: FitSpec, engine: Engine) -> list[tuple[list[int], list[int]]]:
    """Token ids of every pair. ApiError 422 naming the first text that the model can't take."""
    texts = [text for pair in spec.pairs for text in (pair.positive, pair.negative)]
    encoded: list[list[int]] = await run_in_threadpool(lambda: engine.tokenizer(texts)["input_ids"])
    least, most = 2 if spec.options.pooling == "mean" else 1, engine.max_model_len - 1
    for index, ids in enumerate(encoded):
        if not least <= len(ids) <= most:
            where = f"pairs.{index // 2}.{'negative' if index % 2 else 'positive'}"
            raise ApiError(422, f"{where}: {len(ids)} tokens; this model and pooling take {least} to {most}", where)
    return list(zip(encoded[0::2], encoded[1::2], strict=True))


async def run_fit(
    spec: FitSpec,
    engine: Engine,
    store: Store,
    identity: ModelIdentity,
    created_at: datetime,
    progress: Progress,
    annotations: dict[str, str] | None = None,
) -> Publication:
    """Capture both texts of every pair at every layer in one pass, fit, and publish. Raises ApiError or StoreError."""
    pairs = await tokenize(spec, engine)
    positive, negative, h_norm = await _capture(pairs, spec.options.pooling, engine, progress)
    layers = spec.options.default_layers
    config = caa.Config(
        variant=spec.options.variant,
        pooling=spec.options.pooling,
        default_layers=None if layers is None else tuple(layers),
        default_strength=spec.options.default_strength,
    )
    try:
        fitted = await run_in_threadpool(caa.fit, positive, negative, config)
    except ValueError as error:
        raise ApiError(422, str(error), "options") from error
    if zero := [layer for layer in fitted.default_layers if not fitted.vectors[layer].any()]:
        raise ApiError(
            422, f"the two sides of the pairs don't differ at layers {zero}: steering would do nothing", "pairs"
        )
    manifest = _manifest(spec, config, fitted, h_norm, identity, engine, created_at, annotations or {})
    tensors = {f"resid_post.{layer}": vector for layer, vector in enumerate(fitted.vectors)}
    return await run_in_threadpool(store.publish, spec.name, manifest, {"vectors.safetensors": save(tensors)})


async def _capture(
    pairs: list[tuple[list[int], list[int]]], pooling: caa.Pooling, engine: Engine, progress: Progress
) -> tuple[caa.Array, caa.Array, caa.Array]:
    """Activations [pairs, layers, hidden] of both sides, and the mean norm per layer [layers]."""
    means = np.empty((2, len(pairs), engine.layers, engine.hidden_size), np.float32)
    norms = np.zeros(engine.layers, np.float64)
    slots = asyncio.Semaphore(CONCURRENT_CAPTURES)
    done, total = 0, 2 * len(pairs)
    progress(done, total)

    async def capture(side: int, index: int) -> None:
        nonlocal done
        async with slots:
            captured = await engine.capture(pairs[index][side], pooling)
        means[side, index] = captured.mean
        norms[:] += captured.norm
        done += 1
        progress(done, total)

    async with asyncio.TaskGroup() as group:
        for index in range(len(pairs)):
            group.create_task(capture(0, index))
            group.create_task(capture(1, index))
    return means[0], means[1], (norms / total).astype(np.float32)


def _manifest(
    spec: FitSpec,
    config: caa.Config,
    fitted: caa.Fit,
    h_norm: caa.Array,
    identity: ModelIdentity,
    engine: Engine,
    created_at: datetime,
    annotations: dict[str, str],
) -> dict[str, Any]:
    best = int(np.argmax(fitted.agreement))
    return {
        "schema_version": 1,
        "kind": "steering_vector",
        "description": spec.description,
        "model": {
            "architecture": identity["architecture"] or engine.architecture,
            "hidden_size": engine.hidden_size,
            "num_layers": engine.layers,
            "weights_digest": identity["weights_digest"],
            "tokenizer_digest": identity["tokenizer_digest"],
            "name": engine.model_name,
        },
        "sites": [
            {
                "point": "resid_post",
                "layer": layer,
                "file": "vectors.safetensors",
                "tensor": f"resid_post.{layer}",
                "shape": [engine.hidden_size],
                "dtype": "F32",
            }
            for layer in range(engine.layers)
        ],
        "default_strength": config.default_strength,
        "default_layers": list(fitted.default_layers),
        "h_norm": {str(layer): float(norm) for layer, norm in enumerate(h_norm)},
        "languages": spec.languages,
        "provenance": {
            "method": spec.method,
            "config": {key: value for key, value in asdict(config).items() if not isinstance(value, tuple)},
            "data": {
                "name": spec.data.name,
                "sha256": data_digest(spec.pairs),
                "rows": len(spec.pairs),
                "license": spec.data.license,
            },
            "code_version": __version__,
            "created_at": created_at.isoformat(),
        },
        "metrics": {
            "agreement_best": float(fitted.agreement[best]),
            "agreement_best_layer": float(best),
            "agreement_default_layers": float(fitted.agreement[list(fitted.default_layers)].mean()),
        },
        "license": spec.license,
        "annotations": annotations,
    }
