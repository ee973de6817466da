"""Imports of other projects' formats: which model they are for, and what an SAE is measured on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

import numpy as np

from server.models import ModelError, model_identity, resolve_model
from server.version import code_version
from steering_store.errors import InvalidTensor, StoreError
from steering_store.formats import (
    FORMATS,
    Draft,
    Format,
    ImportOptions,
    gated,
    import_artifact,
    with_config,
    with_norms,
)
from steering_store.formats.files import check_room, count
from steering_store.manifest import ModelSpec, Point
from steering_store.tensors import Float32, Tensor, read_tensors, read_whole_header

HEADER_BYTES = 1 << 24
"""Of activations: they have two tensors and a text for each prompt."""


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
    languages: tuple[str, ...]
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
            languages=options.languages,
            code_version=code_version(),
            max_bytes=options.max_bytes,
        ),
        cast("Format | None", _one_of(options.format, tuple(FORMATS), "format")),
    )
    if origin is not None:
        draft = with_config(draft, {"source": origin})
    if draft.sae is None and options.activations is None:
        return draft
    if options.activations is None:
        raise StoreError(
            "an SAE is published only once it was measured on activations of its model: capture some with "
            "POST /v1/activations, positions all, and give the file as --activations",
            "activations",
        )
    activations = Activations(options.activations, model.weights_digest, options.max_bytes)
    draft = with_config(draft, {"activations_sha256": activations.sha256})
    return with_norms(gated(draft, activations), activations)


class Activations:
    """An answer of POST /v1/activations, of which at most `max_bytes` are read at once. Called, it is a Capture: the
    activations [tokens, width] at a site, without the first token of each prompt.

    Raises InvalidTensor where the file is no such answer, or of another model than that with `weights_digest`.
    """

    def __init__(self, path: Path, weights_digest: str | None, max_bytes: int) -> None:
        with path.open("rb") as stream:
            header = read_whole_header(stream, path.name, HEADER_BYTES)
            stream.seek(0)
            self.sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        self._path, self._max_bytes, self._entries = path, max_bytes, header.tensors
        theirs = header.metadata.get("weights_digest")
        if not theirs:
            raise InvalidTensor(
                f"{path.name} doesn't say with which weights it was captured; capture anew with POST /v1/activations",
                "activations",
            )
        if theirs != weights_digest:
            raise InvalidTensor(
                f"{path.name} holds activations of another model, with weights {theirs[:80]}, not {weights_digest}",
                "activations",
            )

    def __call__(self, point: Point, layer: int) -> Float32:
        site = f".{point}.{layer}"
        prompts = [name.removesuffix(site) for name in sorted(self._entries) if name.endswith(site)]
        wanted = [name for prompt in prompts for name in (prompt + site, f"{prompt}.positions")]
        if not wanted:
            raise InvalidTensor(f"{self._path.name} holds nothing of {point}.{layer}: capture that site", "activations")
        if missing := [name for name in wanted if name not in self._entries]:
            raise InvalidTensor(f"{self._path.name} has no tensor {missing[0]!r}", "activations")
        check_room(sum(4 * count(self._entries[name].shape) for name in wanted), self._path.name, self._max_bytes)
        found = read_tensors(self._path, dict.fromkeys(wanted), HEADER_BYTES)
        rows = [self._later(found[prompt + site], found[f"{prompt}.positions"]) for prompt in prompts]
        if len({each.shape[1] for each in rows}) > 1:
            raise InvalidTensor(f"{self._path.name}: {point}.{layer} differs in width; capture it anew", "activations")
        return np.concatenate(rows).astype(np.float32)

    def _later(self, values: Tensor, positions: Tensor) -> Tensor:
        if values.ndim != 2 or positions.ndim != 1 or len(values) != len(positions):
            raise InvalidTensor(f"{self._path.name} holds means: capture with positions all", "activations")
        return values[positions > 0]


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
        revision=identity.get("revision"),
    )


def _one_of(value: str | None, allowed: tuple[str, ...], option: str) -> str | None:
    if value is not None and value not in allowed:
        raise StoreError(f"--{option} {value!r}: choose one of {', '.join(allowed)}", option)
    return value
