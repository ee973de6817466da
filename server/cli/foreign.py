"""Imports of other projects' formats: which model they are for, and what an SAE is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from safetensors import safe_open

from server.models import ModelError, model_identity, resolve_model
from steering_store.errors import InvalidTensor, StoreError
from steering_store.formats import FORMATS, Capture, Draft, Format, ImportOptions, gated, import_artifact
from steering_store.manifest import ModelSpec, Point
from steering_store.tensors import Float32, read_tensors


@dataclass(frozen=True)
class ForeignOptions:
    """What the command line says of a file of another project."""

    model: str | None
    data_dir: Path
    format: str | None
    point: str | None
    layer: int | None
    norm_factor: float | None
    activations: Path | None
    description: str
    license: str | None
    strength: float
    max_bytes: int


def draft_of(path: Path, options: ForeignOptions, origin: str | None) -> Draft:
    """Read a file or folder of another project; an SAE only with activations that it reconstructs.

    `origin`, where it came from, goes into the provenance. Raises StoreError.
    """
    model = _model(options)
    draft = import_artifact(
        path,
        ImportOptions(
            model=model,
            point=cast("Point | None", _one_of(options.point, get_args(Point), "point")),
            layer=options.layer,
            norm_factor=options.norm_factor,
            description=options.description,
            license=options.license,
            default_strength=options.strength,
            max_bytes=options.max_bytes,
        ),
        cast("Format | None", _one_of(options.format, tuple(FORMATS), "format")),
    )
    if origin is not None:
        draft = replace(draft, manifest=_with_origin(draft.manifest, origin))
    if draft.sae is None:
        return draft
    if options.activations is None:
        raise StoreError(
            "an SAE is published only once it was measured on activations of its model: capture some with "
            "POST /v1/activations, positions all, and give the file as --activations",
            "activations",
        )
    return gated(draft, captured(options.activations, model.weights_digest))


def captured(path: Path, weights_digest: str | None) -> Capture:
    """Activations [tokens, width] from an answer of POST /v1/activations, without the first token of each prompt.

    Raises InvalidTensor where they are of another model, or not there.
    """
    with safe_open(path, "np") as file:
        theirs = (file.metadata() or {}).get("weights_digest")
        names = set(file.keys())
    if theirs and weights_digest and theirs != weights_digest:
        raise InvalidTensor(f"{path.name} holds activations of another model, with weights {theirs}", "activations")

    def capture(point: Point, layer: int) -> Float32:
        prompts = [name.partition(".")[0] for name in names if name.endswith(f".{point}.{layer}")]
        rows = []
        for prompt in sorted(prompts):
            wanted = dict.fromkeys([f"{prompt}.{point}.{layer}", f"{prompt}.positions"])
            if missing := wanted.keys() - names:
                raise InvalidTensor(f"{path.name} has no tensor {min(missing)!r}", "activations")
            found = read_tensors(path, wanted)
            values, positions = found[f"{prompt}.{point}.{layer}"], found[f"{prompt}.positions"]
            if values.ndim != 2 or len(values) != len(positions):
                raise InvalidTensor(f"{path.name} holds means: capture with positions all", "activations")
            rows.append(values[positions > 0])
        if not rows:
            raise InvalidTensor(f"{path.name} holds nothing of {point}.{layer}: capture that site", "activations")
        return np.concatenate(rows).astype(np.float32)

    return capture


def _model(options: ForeignOptions) -> ModelSpec:
    if options.model is None:
        raise StoreError("--model: name the model that it is for, a folder, a hub id or an embedded model", "model")
    try:
        found = resolve_model(options.model, options.data_dir, lambda message: None)
    except ModelError as exc:
        raise StoreError(f"--model: {exc}", "model") from exc
    identity = model_identity(found.path)
    if identity["architecture"] is None or identity["hidden_size"] is None or identity["num_layers"] is None:
        raise StoreError(f"--model: {found.path} is not on this machine; give its folder", "model")
    return ModelSpec(
        architecture=identity["architecture"],
        hidden_size=identity["hidden_size"],
        num_layers=identity["num_layers"],
        weights_digest=identity["weights_digest"],
        tokenizer_digest=identity["tokenizer_digest"],
        name=found.name,
    )


def _with_origin(manifest: Mapping[str, Any], origin: str) -> dict[str, Any]:
    provenance = manifest["provenance"]
    return {**manifest, "provenance": {**provenance, "config": {**provenance["config"], "source": origin}}}


def _one_of(value: str | None, allowed: tuple[str, ...], option: str) -> str | None:
    if value is not None and value not in allowed:
        raise StoreError(f"--{option} {value!r}: choose one of {', '.join(allowed)}", option)
    return value
