"""Gemma Scope (arXiv:2408.05147), `layer_20/width_16k/average_l0_71/params.npz`; Gemma Scope 2, `params.safetensors`.

W_enc [width, features], W_dec [features, width], b_enc, b_dec and threshold, also spelled w_enc and w_dec:

    f = relu(p) [p > threshold], p = x W_enc + b_enc;  x^ = f W_dec + b_dec

The layer is in the folders' names. So is the point: by repository in the first (`gemma-scope-2b-pt-res`, -mlp, -att),
and by folder in the second (`resid_post/layer_12_width_16k_l0_medium`).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from steering_store.errors import InvalidTensor, UnsupportedFile
from steering_store.formats.draft import Draft, ImportOptions, agreed_site, sae_draft
from steering_store.formats.files import Folder, read_floats, safetensors_header
from steering_store.formats.hooks import site_of_hook
from steering_store.formats.npz import npz_names, read_npz
from steering_store.formats.sae import Sae
from steering_store.manifest import Point

NPZ, SAFETENSORS = "params.npz", "params.safetensors"
_TENSORS = ("w_enc", "w_dec", "b_enc", "b_dec", "threshold")
_LAYER = re.compile(r"layer_(\d{1,4})(?:_.*)?")
_HOOKS = (
    (re.compile(r"gemma-scope-.*-res|resid_post(_all)?"), "hook_resid_post"),
    (re.compile(r"gemma-scope-.*-mlp|mlp_out(_all)?"), "hook_mlp_out"),
    (re.compile(r"gemma-scope-.*-att|attn_out(_all)?"), "attn.hook_z"),
)
_REFUSED = re.compile(r"embedding|.*transcoder.*|.*crosscoder.*|.*clt.*")


def import_gemma_scope(path: Path, options: ImportOptions) -> Draft:
    """An SAE from its folder or its file of weights. Raises a StoreError."""
    folder = Folder(path if path.is_dir() else path.parent)
    name = (NPZ if folder.has(NPZ) else SAFETENSORS) if path.is_dir() else path.name
    parts = folder.path.absolute().parts[-4:]
    point, layer = agreed_site(*_site(parts, name, options), options, name)
    with folder.open(name) as stream:
        found = npz_names(stream, name) if name.endswith(".npz") else list(safetensors_header(stream, name))
        spelled = {key.lower(): key for key in found}
        if missing := [key for key in _TENSORS if key not in spelled]:
            raise InvalidTensor(f"file {name!r} has no {', '.join(missing)}; is it a Gemma Scope SAE?", name)
        read = read_npz if name.endswith(".npz") else read_floats
        loaded = read(stream, name, [spelled[key] for key in _TENSORS], options.max_bytes)
    encoder, decoder, encoder_bias, decoder_bias, threshold = (loaded[spelled[key]] for key in _TENSORS)
    sae = Sae(encoder.T, encoder_bias, decoder, decoder_bias, "jumprelu", np.maximum(threshold, 0))
    return sae_draft(sae, point, layer, options, {"format": "gemma_scope", "folder": "/".join(parts[-2:])}, name)


def _site(parts: tuple[str, ...], name: str, options: ImportOptions) -> tuple[Point | None, int | None]:
    """The point and the layer that the folders' names tell."""
    if refused := [part for part in parts if _REFUSED.fullmatch(part)]:
        raise UnsupportedFile(f"{name}: {refused[-1]!r} says that it isn't an SAE of one site; use another", name)
    layers = [int(match[1]) for part in parts if (match := _LAYER.fullmatch(part))]
    hooks = [hook for part in parts for pattern, hook in _HOOKS if pattern.fullmatch(part)]
    layer = layers[-1] if layers else options.layer
    if not hooks or layer is None:
        return None, layer
    return site_of_hook(f"blocks.{layer}.{hooks[-1]}", options.model.architecture, name)
