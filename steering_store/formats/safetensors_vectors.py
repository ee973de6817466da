"""Vectors [width] in one safetensors file, named for their layer.

`resid_post.14`, `blocks.14.hook_resid_post`, `layers.14`, `layer.14`, `layer14.v` (steering-lite), `direction.14` and
`14` are understood; a single vector may have any name, where the layer is given.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from steering_store.errors import UnsupportedFile
from steering_store.formats.draft import Draft, ImportOptions, agreed_site, vector_draft
from steering_store.formats.files import Folder, read_floats, safetensors_header
from steering_store.formats.hooks import site_of_hook
from steering_store.manifest import Point
from steering_store.tensors import Float32

_OURS = re.compile(rf"({'|'.join(get_args(Point))})\.(\d{{1,4}})")
_LAYER = re.compile(r"(?:(?:layer|direction)[._]?)?(\d{1,4})(?:\.\w+)?")


def import_safetensors(path: Path, options: ImportOptions) -> Draft:
    """A steering vector from a .safetensors file. Raises a StoreError."""
    name = path.name
    with Folder(path.parent).open(name) as stream:
        entries = safetensors_header(stream, name)
        wrong = [tensor for tensor, entry in entries.items() if len(entry.shape) != 1]
        if not entries or wrong:
            raise UnsupportedFile(f"file {name!r} must hold vectors only, and {wrong[:8] or 'nothing'} isn't one", name)
        sites = {tensor: _site(tensor, options, name, alone=len(entries) == 1) for tensor in entries}
        vectors = read_floats(stream, name, entries, options.max_bytes)
    points = {point for point, _ in sites.values()}
    by_layer: dict[int, Float32] = {layer: vectors[tensor] for tensor, (_, layer) in sites.items()}
    if len(points) > 1 or len(by_layer) < len(sites):
        raise UnsupportedFile(f"file {name!r} must hold one vector a layer, all at one point; split it", name)
    return vector_draft(by_layer, points.pop(), options, {"format": "safetensors"}, name)


def _site(tensor: str, options: ImportOptions, file: str, *, alone: bool) -> tuple[Point, int]:
    if match := _OURS.fullmatch(tensor):
        return agreed_site(match[1], int(match[2]), options, file)  # type: ignore[arg-type]
    if match := _LAYER.fullmatch(tensor):
        return agreed_site(options.point or "resid_post", int(match[1]), options, file)
    if alone and options.layer is not None:
        return options.point or "resid_post", options.layer
    point, layer = site_of_hook(tensor, options.model.architecture, file)
    return agreed_site(point, layer, options, file)
