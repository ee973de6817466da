"""Llama Scope (arXiv:2410.20526): the release's layout, and that of later checkpoints of OpenMOSS/Language-Model-SAEs.

| release | `hyperparams.json`, `checkpoints/final.safetensors`; one `jump_relu_threshold` for all features |
| later   | `config.json`, `sae_weights.safetensors`; `log_jumprelu_threshold` [features] |

encoder.weight [features, width], encoder.bias, decoder.weight [width, features], decoder.bias. With n = sqrt(width) /
dataset_average_activation_norm, z = n x (less decoder.bias, with apply_decoder_bias_to_pre_encoder):

    f = p [p |decoder_k| > threshold], p = encoder z + encoder.bias;  x^ = (decoder f + decoder.bias) / n

|decoder_k| only with sparsity_include_decoder_norm. The release's threshold was calibrated on p / n, after lm_saes'
standardisation, and is multiplied by n here, as SAELens does since its authors' correction (pull request 483).
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from steering_store.errors import InvalidManifest, InvalidTensor, UnsupportedFile
from steering_store.formats.draft import Draft, ImportOptions, agreed_site, sae_draft
from steering_store.formats.files import Config, Folder, Name, read_floats, safetensors_header
from steering_store.formats.hooks import site_of_hook
from steering_store.formats.sae import Sae, folded
from steering_store.tensors import Float32

RELEASE, LATER = "hyperparams.json", "config.json"
_WEIGHTS = {RELEASE: ("checkpoints/final.safetensors", "final.safetensors"), LATER: ("sae_weights.safetensors",)}
_TENSORS = ("encoder.weight", "encoder.bias", "decoder.weight")
_LOG_THRESHOLD, _BIAS = "log_jumprelu_threshold", "decoder.bias"
_NORM = "dataset_average_activation_norm"


class _Norms(Config):
    inward: PositiveFloat = Field(validation_alias="in")
    outward: PositiveFloat = Field(validation_alias="out")


class _Fields(Config):
    d_model: PositiveInt
    hook_point_in: Name
    hook_point_out: Name | None = None
    act_fn: Name = "jumprelu"
    jump_relu_threshold: PositiveFloat | None = None
    norm_activation: Name = "dataset-wise"
    dataset_average_activation_norm: _Norms | None = None
    use_decoder_bias: bool = True
    apply_decoder_bias_to_pre_encoder: bool = False
    sparsity_include_decoder_norm: bool = True
    use_glu_encoder: bool = False
    top_k: PositiveInt | None = None


def import_llama_scope(path: Path, options: ImportOptions) -> Draft:
    """An SAE from its folder. Raises a StoreError."""
    folder = Folder(path if path.is_dir() else path.parent)
    config = RELEASE if folder.has(RELEASE) else LATER
    fields = folder.config(config, _Fields)
    _check_supported(fields, config)
    point, layer = agreed_site(*site_of_hook(fields.hook_point_in, options.model.architecture, config), options, config)
    weights = next((name for name in _WEIGHTS[config] if folder.has(name)), _WEIGHTS[config][0])
    with folder.open(weights) as stream:
        found = safetensors_header(stream, weights)
        norm = f"{_NORM}.{fields.hook_point_in}"
        wanted = [*_TENSORS, *(name for name in (_BIAS, _LOG_THRESHOLD, norm) if name in found)]
        loaded = read_floats(stream, weights, wanted, options.max_bytes)
    factor = _factor(fields, loaded.get(norm), options, config)
    encoder, bias, decoder = (loaded[name] for name in _TENSORS)
    if encoder.shape[1:] != (fields.d_model,):
        raise InvalidManifest(f"{config}: d_model is {fields.d_model}, and the encoder's shape {encoder.shape}", config)
    decoder_bias = loaded.get(_BIAS, np.zeros(fields.d_model, np.float32))
    top_k = fields.top_k if fields.act_fn == "topk" else None
    sae = Sae(encoder, bias, decoder.T, decoder_bias, None, None, top_k)
    sae.check_shapes(weights)
    if top_k is None:
        threshold = _threshold(fields, loaded.get(_LOG_THRESHOLD), factor, sae, config)
        sae = Sae(encoder, bias, decoder.T, decoder_bias, "jumprelu", threshold)
    sae = folded(sae, factor=factor, bias_is_subtracted=fields.apply_decoder_bias_to_pre_encoder)
    return sae_draft(sae, point, layer, options, {"format": "llama_scope", "hook": fields.hook_point_in}, weights)


def _check_supported(fields: _Fields, config: str) -> None:
    if fields.act_fn not in ("jumprelu", "topk") or (fields.act_fn == "topk" and fields.top_k is None):
        raise UnsupportedFile(
            f"{config}: act_fn {fields.act_fn!r}; only jumprelu, and topk with top_k, are known", config
        )
    if fields.act_fn == "topk" and fields.sparsity_include_decoder_norm:
        raise UnsupportedFile(
            f"{config}: topk by activation times decoder norm isn't known; use the jumprelu one", config
        )
    if fields.use_glu_encoder:
        raise UnsupportedFile(f"{config}: an encoder with GLU isn't an SAE that polyhelm can read", config)
    if fields.hook_point_out not in (None, fields.hook_point_in):
        raise UnsupportedFile(f"{config}: a transcoder, from {fields.hook_point_in} to {fields.hook_point_out}", config)


def _factor(fields: _Fields, stored: Float32 | None, options: ImportOptions, config: str) -> float:
    """What an activation is multiplied by before the encoder."""
    if fields.norm_activation == "inference":
        return 1.0
    if fields.norm_activation != "dataset-wise":
        raise UnsupportedFile(
            f"{config}: norm_activation {fields.norm_activation!r} divides by a token's length, which can't be folded",
            config,
        )
    norms = fields.dataset_average_activation_norm
    if norms is not None:
        if norms.inward != norms.outward:
            raise UnsupportedFile(f"{config}: its norms differ inward and outward, as a transcoder's do", config)
        return math.sqrt(fields.d_model) / norms.inward
    if stored is not None and stored.size == 1 and stored.item() > 0:
        return math.sqrt(fields.d_model) / stored.item()
    if options.norm_factor is None:
        raise InvalidManifest(
            f"norm_factor: {config} doesn't have {_NORM}; give sqrt(width) / mean length of an activation",
            "norm_factor",
        )
    return options.norm_factor


def _threshold(fields: _Fields, logarithm: Float32 | None, factor: float, sae: Sae, config: str) -> Float32:
    """[features], for the values p of the features."""
    if logarithm is not None:
        threshold: Float32 = np.exp(logarithm)
    elif fields.jump_relu_threshold is not None:
        threshold = np.full(len(sae.encoder), fields.jump_relu_threshold * factor, np.float32)
    else:
        raise InvalidManifest(
            f"{config}: jump_relu_threshold is missing; correct the file", f"{config}.jump_relu_threshold"
        )
    if threshold.shape != sae.encoder_bias.shape:
        raise InvalidTensor(
            f"{_LOG_THRESHOLD} has the shape {threshold.shape}; download the file again", _LOG_THRESHOLD
        )
    if not fields.sparsity_include_decoder_norm:
        return threshold
    norms = np.linalg.norm(sae.decoder, axis=1)
    if not norms.all():
        raise InvalidTensor(f"{config}: a feature's decoder is zero, so its threshold is infinite; prune it", config)
    scaled: Float32 = threshold / norms
    return scaled
