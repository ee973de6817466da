"""SAELens (github.com/decoderesearch/SAELens): a folder of `cfg.json` and `sae_weights.safetensors`, versions 3 to 6.

With z = n x - b_dec (or n x, without apply_b_dec_to_input), W_enc [width, features] and W_dec [features, width]:

    standard  f = relu(z W_enc + b_enc)
    jumprelu  f = relu(p) [p > threshold], p = z W_enc + b_enc
    gated     f = [z W_enc + b_gate > 0] relu(exp(r_mag) z W_enc + b_mag)
    topk      f = relu(p) among the k largest p = z W_enc + b_enc
    x^ = (f W_dec + b_dec) / n

n is 1, or the factor of normalize_activations "expected_average_only_in", which SAELens keeps outside these files.
Before version 6 the fields of `metadata` were in cfg.json itself, and the hook was called hook_point until version 3.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import AliasChoices, Field, PositiveInt

from steering_store.errors import InvalidManifest, InvalidTensor, UnsupportedFile
from steering_store.formats.draft import Draft, ImportOptions, agreed_site, sae_draft, write_safetensors
from steering_store.formats.files import Config, Folder, Name, parsed, read_floats, safetensors_header
from steering_store.formats.hooks import hook_of_site, site_of_hook
from steering_store.formats.sae import Sae, folded
from steering_store.manifest import Manifest, Point
from steering_store.tensors import Float32

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_COMMON = ("W_enc", "W_dec", "b_dec")
_TENSORS: dict[str, tuple[str, ...]] = {
    "standard": (*_COMMON, "b_enc"),
    "jumprelu": (*_COMMON, "b_enc", "threshold"),
    "gated": (*_COMMON, "b_gate", "b_mag", "r_mag"),
    "topk": (*_COMMON, "b_enc"),
}


class _Fields(Config):
    architecture: Name = "standard"
    d_in: PositiveInt
    d_sae: PositiveInt
    apply_b_dec_to_input: bool = True
    normalize_activations: Name | bool | None = None
    activation_fn: Name | None = Field(None, validation_alias=AliasChoices("activation_fn_str", "activation_fn"))
    activation_fn_kwargs: dict[str, Any] | None = None
    k: PositiveInt | None = None
    rescale_acts_by_decoder_norm: bool = False


class _Metadata(Config):
    hook_name: Name | None = None
    hook_point: Name | None = None
    hook_head_index: int | None = None
    model_name: Name | None = None
    sae_lens_version: Name | None = None


def import_saelens(path: Path, options: ImportOptions) -> Draft:
    """An SAE from its folder, or from one of the two files in it. Raises a StoreError."""
    folder = Folder(path if path.is_dir() else path.parent)
    raw = folder.json(CONFIG)
    nested = raw.get("metadata")
    fields = parsed(raw, CONFIG, _Fields)
    metadata = parsed(nested if isinstance(nested, dict) else raw, CONFIG, _Metadata)
    architecture = _architecture(fields)
    factor = _norm_factor(fields, options)
    point, layer = agreed_site(*_site(metadata, options), options, CONFIG)
    with folder.open(WEIGHTS) as stream:
        names = _TENSORS[architecture]
        scaling = "scaling_factor" in safetensors_header(stream, WEIGHTS)
        loaded = read_floats(stream, WEIGHTS, (*names, "scaling_factor") if scaling else names, options.max_bytes)
    if scaling and (loaded["scaling_factor"] != 1).any():
        raise UnsupportedFile(f"{WEIGHTS}: scaling_factor isn't 1; fold it into W_dec, and save again", WEIGHTS)
    sae = _sae(loaded, fields, architecture, factor)
    if sae.encoder.shape != (fields.d_sae, fields.d_in):
        raise InvalidManifest(f"{CONFIG}: d_in and d_sae differ from W_enc; download the folder again", CONFIG)
    source = {"format": "saelens", "architecture": architecture} | {
        key: value
        for key, value in (("model_name", metadata.model_name), ("sae_lens_version", metadata.sae_lens_version))
        if value is not None
    }
    return sae_draft(sae, point, layer, options, source, WEIGHTS)


def export_saelens(manifest: Manifest, tensors: Mapping[str, Float32], folder: Path) -> list[Path]:
    """Write an SAE's layer as SAELens 6 reads it. `tensors` are those of the artifact, by name.

    Raises UnsupportedFile for an artifact that isn't an SAE at one layer, or has no counterpart there.
    """
    if manifest.kind != "sae" or len(manifest.layers) != 1:
        raise UnsupportedFile(f"only a sae of one layer can be exported to SAELens, and this is a {manifest.kind}")
    if manifest.activation not in ("relu", "jumprelu"):
        raise UnsupportedFile(f"SAELens has no SAE with the activation {manifest.activation}")
    by_role = {site.role: tensors[site.tensor] for site in manifest.sites}
    features, width = by_role["encoder"].shape
    weights = {
        "W_enc": by_role["encoder"].T,
        "b_enc": by_role["encoder_bias"],
        "W_dec": by_role["decoder"],
        "b_dec": by_role.get("decoder_bias", np.zeros(width, np.float32)),
    }
    if manifest.activation == "jumprelu":
        weights["threshold"] = by_role["threshold"]
    config = {
        "architecture": "jumprelu" if manifest.activation == "jumprelu" else "standard",
        "d_in": width,
        "d_sae": features,
        "dtype": "float32",
        "device": "cpu",
        # It is in b_enc already.
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if manifest.point == "head_out" else "none",
        "metadata": {
            "sae_lens_version": "6.0.0",
            "model_name": manifest.model.name,
            "hook_name": hook_of_site(manifest.point, manifest.layers[0]),
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    write_safetensors(folder / WEIGHTS, weights)
    return [folder / CONFIG, folder / WEIGHTS]


def _architecture(fields: _Fields) -> str:
    name = "topk" if fields.activation_fn == "topk" else fields.architecture
    if name not in _TENSORS:
        raise UnsupportedFile(f"{CONFIG}: architecture {name!r}; only {', '.join(_TENSORS)} are known", CONFIG)
    if fields.activation_fn not in (None, "relu", "topk"):
        raise UnsupportedFile(f"{CONFIG}: activation_fn {fields.activation_fn!r}; only relu and topk are known", CONFIG)
    return name


def _norm_factor(fields: _Fields, options: ImportOptions) -> float:
    mode = fields.normalize_activations
    mode = {True: "expected_average_only_in", False: "none", None: "none"}.get(mode, mode)  # type: ignore[arg-type]
    if mode == "none":
        if options.norm_factor not in (None, 1.0):
            raise InvalidManifest(f"norm_factor: {CONFIG} says that there is none; leave it out", "norm_factor")
        return 1.0
    if mode != "expected_average_only_in":
        raise UnsupportedFile(
            f"{CONFIG}: normalize_activations {mode!r} divides each token by its own length, which can't be folded",
            CONFIG,
        )
    if options.norm_factor is None:
        raise InvalidManifest(
            f"norm_factor: activations were scaled before this SAE, and {CONFIG} doesn't say by what; give "
            "sqrt(width) / mean length, which SAELens lists as norm_scaling_factor",
            "norm_factor",
        )
    return options.norm_factor


def _site(metadata: _Metadata, options: ImportOptions) -> tuple[Point | None, int | None]:
    if metadata.hook_head_index is not None:
        raise UnsupportedFile(f"{CONFIG}: an SAE of a single head; only those of all heads are known", CONFIG)
    hook = metadata.hook_name or metadata.hook_point
    return (None, None) if hook is None else site_of_hook(hook, options.model.architecture, CONFIG)


def _sae(loaded: Mapping[str, Float32], fields: _Fields, architecture: str, factor: float) -> Sae:
    sae = Sae(
        loaded["W_enc"].T,
        loaded["b_mag" if architecture == "gated" else "b_enc"],
        loaded["W_dec"],
        loaded["b_dec"],
        "relu",
    )
    if architecture == "topk":
        sae = replace(sae, activation=None, top_k=_top_k(fields))
    elif architecture == "jumprelu":
        sae = replace(sae, activation="jumprelu", threshold=np.maximum(loaded["threshold"], 0))
    sae.check_shapes(WEIGHTS)
    if architecture == "gated":
        sae = _ungated(sae, loaded["b_gate"], loaded["r_mag"])
    if fields.rescale_acts_by_decoder_norm:
        norms = np.linalg.norm(sae.decoder, axis=1)
        sae = replace(
            sae,
            encoder=sae.encoder * norms[:, None],
            encoder_bias=sae.encoder_bias * norms,
            decoder=sae.decoder / np.maximum(norms, np.finfo(np.float32).tiny)[:, None],
        )
    return folded(sae, factor=factor, bias_is_subtracted=fields.apply_b_dec_to_input)


def _ungated(sae: Sae, gate: Float32, log_scale: Float32) -> Sae:
    """A gate that shares the encoder's directions is a threshold (Rajamanoharan et al. 2024, arXiv:2404.16014)."""
    if not gate.shape == log_scale.shape == sae.encoder_bias.shape:
        raise InvalidTensor(f"file {WEIGHTS!r}: b_gate, r_mag and b_mag differ in shape; download it again", WEIGHTS)
    scale = np.exp(log_scale)
    threshold = np.maximum(sae.encoder_bias - scale * gate, 0)
    return replace(sae, encoder=sae.encoder * scale[:, None], activation="jumprelu", threshold=threshold)


def _top_k(fields: _Fields) -> int:
    top_k = fields.k or (fields.activation_fn_kwargs or {}).get("k")
    if not isinstance(top_k, int):
        raise InvalidManifest(f"{CONFIG}: a topk SAE without k; correct the file", f"{CONFIG}.k")
    return top_k
