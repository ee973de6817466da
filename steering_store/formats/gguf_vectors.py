"""Control vectors in gguf: repeng, llama.cpp's --control-vector and EasySteer, which all write `direction.N` [hidden].

**N is our layer.** llama.cpp adds direction.N behind decoder layer N counted from 0 (`build_cvec(cur, il)` just before
"l_out"), repeng fits it on hidden_states[N + 1], and EasySteer numbers modules from 0. What begins at 1 is the list:
llama.cpp refuses a direction.0, as it keeps no room for layer 0; repeng and EasySteer write one if asked for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from pydantic_core import from_json

from steering_store.errors import InvalidManifest, UnsupportedFile
from steering_store.formats.draft import Draft, ImportOptions, vector_draft
from steering_store.formats.files import Config, Folder, Name, parsed
from steering_store.formats.gguf_file import Value, read_gguf, read_gguf_header
from steering_store.manifest import Manifest, Point
from steering_store.tensors import Float32

ARCHITECTURE = "controlvector"
_DIRECTION = re.compile(r"direction\.(\d{1,4})")
_EASYSTEER = "controlvector.easysteer"


class _EasySteer(Config):
    version: int
    component: Name | None = None


def import_gguf(path: Path, options: ImportOptions) -> Draft:
    """A steering vector from a .gguf file. Raises a StoreError."""
    name = path.name
    with Folder(path.parent).open(name) as stream:
        keys, tensors = read_gguf_header(stream, name)
        if (architecture := keys.get("general.architecture")) != ARCHITECTURE:
            raise UnsupportedFile(f"file {name!r} is a {str(architecture)[:64]}, and no {ARCHITECTURE}", name)
        layers = {key: int(match[1]) for key in tensors if (match := _DIRECTION.fullmatch(key))}
        if not layers or len(layers) < len(tensors) or len(set(layers.values())) < len(layers):
            raise UnsupportedFile(f"file {name!r} must hold direction.N for different N, and nothing else", name)
        vectors = read_gguf(stream, name, tensors, options.max_bytes)
    source = {"format": "gguf"} | {
        key: value for key in ("model_hint", "method") if isinstance(value := keys.get(f"controlvector.{key}"), str)
    }
    point = _point(keys.get(_EASYSTEER), options, name)
    return vector_draft({layers[key]: vector for key, vector in vectors.items()}, point, options, source, name)


def export_gguf(
    manifest: Manifest, tensors: Mapping[str, Float32], path: Path, layers: Collection[int] | None = None
) -> None:
    """Write a steering vector for llama.cpp, of all its layers or some. `tensors` are those of the artifact, by name.

    llama.cpp's --control-vector-scaled is the strength. Raises UnsupportedFile for what it can't hold: another kind or
    point, or layer 0.
    """
    if manifest.kind != "steering_vector" or manifest.point != "resid_post":
        raise UnsupportedFile("only a steering_vector at resid_post is a control vector; export another artifact")
    chosen = manifest.layers if layers is None else sorted(set(layers))
    if unknown := set(chosen) - set(manifest.layers):
        raise InvalidManifest(f"layers: {sorted(unknown)} aren't among the artifact's, {manifest.layers}", "layers")
    if not chosen or 0 in chosen:
        remedy = [layer for layer in manifest.layers if layer]
        raise UnsupportedFile(
            f"llama.cpp can't steer behind layer 0; choose the layers to export among {remedy}", "layers"
        )
    by_layer = {site.layer: np.ascontiguousarray(tensors[site.tensor], np.float32) for site in manifest.sites}
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        writer.add_string("controlvector.model_hint", _hint(manifest))
        writer.add_string("controlvector.method", _method(manifest))
        writer.add_uint32("controlvector.layer_count", len(chosen))
        for layer in chosen:
            writer.add_tensor(f"direction.{layer}", by_layer[layer])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _hint(manifest: Manifest) -> str:
    hint = manifest.provenance.config.get("model_hint")
    return hint if isinstance(hint, str) else manifest.model.architecture


def _method(manifest: Manifest) -> str:
    method = manifest.provenance.config.get("method")
    return method if isinstance(method, str) else manifest.provenance.method


def _point(native: Value, options: ImportOptions, name: str) -> Point:
    """EasySteer says what its vectors were captured from; other writers know only the residual stream."""
    if native is None:
        return options.point or "resid_post"
    try:
        content = from_json(native) if isinstance(native, str) else None
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise InvalidManifest(f"file {name!r}: {_EASYSTEER} isn't a JSON object; write it again", name)
    component = parsed(content, name, _EasySteer).component
    if component == "hidden_states" or (component is None and options.point is None):
        return "resid_post"
    if options.point is None:
        raise InvalidManifest(f"point: the vectors of {name!r} belong to {component!r}; give the point", "point")
    return options.point
