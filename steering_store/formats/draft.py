"""What an importer makes of a file: a manifest and tensors, ready to publish."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from steering_store.errors import InvalidManifest, UnsupportedFile
from steering_store.formats.sae import Sae
from steering_store.manifest import ModelSpec, Point, parse_manifest, width_at
from steering_store.tensors import Float32

FILE = "artifact.safetensors"


@dataclass(frozen=True)
class ImportOptions:
    """What the file itself doesn't say.

    `model` is the model that the artifact is for. `point` and `layer` say where it belongs, and must agree with the
    file where that says it too. `norm_factor` is what activations are multiplied by before an SAE sees them, for the
    files that leave it out. `max_bytes` bounds the tensors of the file, as float32; an import needs about three times
    that. The others go into the manifest as they are.
    """

    model: ModelSpec
    point: Point | None = None
    layer: int | None = None
    norm_factor: float | None = None
    description: str = ""
    license: str | None = None
    default_strength: float = 1.0
    languages: tuple[str, ...] = ()
    code_version: str | None = None
    max_bytes: int = 1 << 30


@dataclass(frozen=True)
class Draft:
    """An artifact to be: `Store.publish(name, draft.manifest, draft.write(folder))`.

    `sae` is given for an SAE; one with a `top_k` must be calibrated first, and publication refuses it until then.
    """

    manifest: dict[str, Any]
    tensors: Mapping[str, Float32]
    sae: Sae | None = None

    def write(self, folder: Path) -> dict[str, Path]:
        """Write the tensors as safetensors into `folder`; the same tensors always give the same bytes."""
        path = folder / FILE
        write_safetensors(path, self.tensors)
        return {FILE: path}


def vector_draft(
    vectors: Mapping[int, Float32], point: Point, options: ImportOptions, source: Mapping[str, Any], file: str
) -> Draft:
    """A steering vector from vectors [width] by layer. `source` goes into the provenance. Raises a StoreError."""
    tensors = {f"{point}.{layer}": np.ascontiguousarray(vector) for layer, vector in sorted(vectors.items())}
    _check_width({vector.shape[-1] for vector in tensors.values() if vector.ndim}, point, options, file)
    sites = [_site(point, layer, None, tensors[f"{point}.{layer}"]) for layer in sorted(vectors)]
    manifest = _manifest("steering_vector", sites, options, source)
    parse_manifest(manifest)
    return Draft(manifest, tensors)


def sae_draft(
    sae: Sae, point: Point, layer: int, options: ImportOptions, source: Mapping[str, Any], file: str
) -> Draft:
    """An SAE at one site. `source` goes into the provenance. Raises a StoreError."""
    sae.check_shapes(file)
    _check_width({sae.encoder.shape[1]}, point, options, file)
    if layer >= options.model.num_layers:
        raise InvalidManifest(f"layer: {layer} isn't below the model's {options.model.num_layers} layers", "layer")
    tensors = {f"{point}.{layer}.{role}": np.ascontiguousarray(tensor) for role, tensor in sae.tensors().items()}
    sites = [_site(point, layer, name.rsplit(".", 1)[1], tensor) for name, tensor in tensors.items()]
    manifest = _manifest("sae", sites, options, source)
    if sae.activation is not None:
        manifest["activation"] = sae.activation
        parse_manifest(manifest)
    return Draft(manifest, tensors, sae)


def with_config(draft: Draft, config: Mapping[str, Any]) -> Draft:
    """The draft with more in the configuration that its provenance tells."""
    provenance = draft.manifest["provenance"]
    provenance = {**provenance, "config": {**provenance["config"], **config}}
    return replace(draft, manifest={**draft.manifest, "provenance": provenance})


def with_sae(draft: Draft, sae: Sae, config: Mapping[str, Any]) -> Draft:
    """The draft with another SAE at its site, and more in its provenance."""
    site = draft.manifest["sites"][0]
    point, layer = site["point"], site["layer"]
    tensors = {f"{point}.{layer}.{role}": np.ascontiguousarray(tensor) for role, tensor in sae.tensors().items()}
    sites = [_site(point, layer, name.rsplit(".", 1)[1], tensor) for name, tensor in tensors.items()]
    manifest = {**with_config(draft, config).manifest, "sites": sites, "activation": sae.activation}
    parse_manifest(manifest)
    return replace(draft, manifest=manifest, tensors=tensors, sae=sae)


def agreed_site(point: Point | None, layer: int | None, options: ImportOptions, file: str) -> tuple[Point, int]:
    """The site that the file (None where it doesn't say) and the options name.

    Raises InvalidManifest where they differ, or neither tells.
    """
    chosen_point, chosen_layer = point or options.point, options.layer if layer is None else layer
    if chosen_point is None or chosen_layer is None:
        missing = "point" if chosen_point is None else "layer"
        raise InvalidManifest(f"{missing}: {file!r} doesn't say at which {missing} it belongs; give it", missing)
    for name, given, chosen in (("point", options.point, chosen_point), ("layer", options.layer, chosen_layer)):
        if given is not None and given != chosen:
            raise InvalidManifest(f"{name}: {given} was given, and {file!r} is for {chosen}; leave it out", name)
    return chosen_point, chosen_layer


def write_safetensors(path: Path, tensors: Mapping[str, Float32]) -> None:
    """Write float32 tensors one after the other, so that memory holds none of them twice."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in sorted(tensors.items()):
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in sorted(tensors.items()):
            stream.write(np.ascontiguousarray(tensor, "<f4").data)


def _site(point: Point, layer: int, role: str | None, tensor: Float32) -> dict[str, Any]:
    name = f"{point}.{layer}" + (f".{role}" if role else "")
    site = {"point": point, "layer": layer, "file": FILE, "tensor": name, "shape": list(tensor.shape), "dtype": "F32"}
    return site if role is None else site | {"role": role}


def _manifest(
    kind: str, sites: list[dict[str, Any]], options: ImportOptions, source: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "kind": kind,
        "description": options.description,
        "model": options.model.model_dump(exclude_none=True),
        "sites": sites,
        "default_strength": options.default_strength,
        "languages": list(options.languages),
        "provenance": {"method": "import", "config": dict(source), "code_version": options.code_version},
        "license": options.license,
    }


def _check_width(widths: set[int], point: Point, options: ImportOptions, file: str) -> None:
    try:
        wanted = width_at(options.model, point)
    except KeyError:
        raise InvalidManifest(f"model.widths: the width of {point} is missing; give it", "model.widths") from None
    if wrong := widths - {wanted}:
        raise UnsupportedFile(
            f"file {file!r} is for activations {sorted(wrong)} wide, and those of the model at {point} are {wanted}: "
            "it belongs to another model or point",
            file,
        )
