"""Files in the layouts of the projects that they come from, and what their own formulas make of an activation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from safetensors.numpy import save_file

from steering_store.formats import Format, ImportOptions
from steering_store.manifest import ModelSpec

WIDTH, FEATURES, TOP_K = 16, 48, 3
MODEL = ModelSpec(architecture="LlamaForCausalLM", hidden_size=WIDTH, num_layers=6, widths={"head_out": WIDTH})
OPTIONS = ImportOptions(model=MODEL, max_bytes=1 << 20)

Array = np.ndarray[Any, np.dtype[np.float32]]
Formula = Callable[[Array], tuple[Array, Array]]
"""Feature activations and reconstruction of x [tokens, WIDTH]."""


@dataclass(frozen=True)
class Written:
    """What was written: where, in which format, for which site, and the formula of the project that reads it."""

    path: Path
    format: Format
    site: tuple[str, int]
    formula: Formula | None = None
    options: ImportOptions = OPTIONS


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def weights() -> dict[str, Array]:
    """In SAELens' names and orientations."""
    generator = np.random.default_rng(0)
    decoder = generator.normal(size=(FEATURES, WIDTH)).astype(np.float32)
    decoder /= np.linalg.norm(decoder, axis=1, keepdims=True)
    return {
        "W_enc": np.ascontiguousarray(decoder.T),
        "b_enc": generator.normal(-0.8, 0.1, FEATURES).astype(np.float32),
        "W_dec": decoder * 0.5,
        "b_dec": generator.normal(size=WIDTH).astype(np.float32),
        "threshold": generator.uniform(0.2, 1.0, FEATURES).astype(np.float32),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def write_saelens(folder: Path, config: dict[str, Any], tensors: dict[str, Array]) -> Path:
    write_json(folder / "cfg.json", {"d_in": WIDTH, "d_sae": FEATURES, "dtype": "float32", "device": "cpu", **config})
    save_file(tensors, folder / "sae_weights.safetensors")
    return folder


def saelens_v3(folder: Path) -> Written:
    w = weights()
    del w["threshold"]
    config = {
        "model_name": "m",
        "hook_point": "blocks.2.hook_resid_pre",
        "hook_point_layer": 2,
        "hook_point_head_index": None,
        "activation_fn": "relu",
        "normalize_activations": False,
    }
    path = write_saelens(folder, config, {**w, "scaling_factor": np.ones(FEATURES, np.float32)})

    def formula(x: Array) -> tuple[Array, Array]:
        f = relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        return f, f @ w["W_dec"] + w["b_dec"]

    return Written(path, "saelens", ("resid_post", 1), formula)


def saelens_v4_gated(folder: Path) -> Written:
    w = weights()
    w["b_mag"], w["b_gate"] = w.pop("b_enc"), w.pop("threshold") - 0.5
    w["r_mag"] = np.linspace(-0.3, 0.3, FEATURES, dtype=np.float32)
    config = {
        "architecture": "gated",
        "hook_name": "blocks.3.hook_mlp_out",
        "hook_layer": 3,
        "hook_head_index": None,
        "activation_fn_str": "relu",
        "activation_fn_kwargs": {},
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "sae_lens_training_version": "4.0.1",
    }
    path = write_saelens(folder, config, w)

    def formula(x: Array) -> tuple[Array, Array]:
        z = x - w["b_dec"]
        magnitude = relu(z @ (w["W_enc"] * np.exp(w["r_mag"])) + w["b_mag"])
        f = magnitude * (z @ w["W_enc"] + w["b_gate"] > 0)
        return f, f @ w["W_dec"] + w["b_dec"]

    return Written(path, "saelens", ("mlp_out", 3), formula)


def saelens_v5_topk(folder: Path) -> Written:
    w = weights()
    del w["threshold"]
    config = {
        "architecture": "standard",
        "hook_name": "blocks.4.attn.hook_z",
        "hook_layer": 4,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": TOP_K},
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    }
    return Written(write_saelens(folder, config, w), "saelens", ("head_out", 4), topk_formula(w, subtract=False))


def saelens_v6_jumprelu(folder: Path) -> Written:
    w = weights()
    factor = 1.75
    config = {
        "architecture": "jumprelu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "expected_average_only_in",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.12.1", "model_name": "m", "hook_name": "blocks.5.hook_resid_post"},
    }
    path = write_saelens(folder, config, w)

    def formula(x: Array) -> tuple[Array, Array]:
        p = (x * factor - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        f = relu(p) * (p > w["threshold"])
        return f, (f @ w["W_dec"] + w["b_dec"]) / factor

    options = ImportOptions(model=MODEL, max_bytes=1 << 20, norm_factor=factor)
    return Written(path, "saelens", ("resid_post", 5), formula, options)


def saelens_v6_topk_rescaled(folder: Path) -> Written:
    w = weights()
    del w["threshold"]
    config = {
        "architecture": "topk",
        "k": TOP_K,
        "rescale_acts_by_decoder_norm": True,
        "metadata": {"sae_lens_version": "6.20.0", "hook_name": "model.layers.0"},
    }
    path = write_saelens(folder, config, w)

    def formula(x: Array) -> tuple[Array, Array]:
        norms = np.linalg.norm(w["W_dec"], axis=1)
        f = largest(((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms)
        return f, f / norms @ w["W_dec"] + w["b_dec"]

    return Written(path, "saelens", ("resid_post", 0), formula)


def largest(pre: Array) -> Array:
    """relu, and 0 for all but the TOP_K largest of each row."""
    order = np.argsort(pre, axis=1)[:, :-TOP_K]
    acts = relu(pre)
    np.put_along_axis(acts, order, 0, axis=1)
    return acts


def topk_formula(w: dict[str, Array], *, subtract: bool) -> Formula:
    def formula(x: Array) -> tuple[Array, Array]:
        f = largest((x - w["b_dec"] * subtract) @ w["W_enc"] + w["b_enc"])
        return f, f @ w["W_dec"] + w["b_dec"]

    return formula


def gemma_formula(x: Array) -> tuple[Array, Array]:
    w = weights()
    p = x @ w["W_enc"] + w["b_enc"]
    f = relu(p) * (p > w["threshold"])
    return f, f @ w["W_dec"] + w["b_dec"]


def gemma_scope(folder: Path) -> Written:
    path = folder / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "average_l0_71"
    path.mkdir(parents=True)
    np.savez(path / "params.npz", **weights())
    return Written(path / "params.npz", "gemma_scope", ("resid_post", 3), gemma_formula)


def gemma_scope_attention(folder: Path) -> Written:
    """Compressed, with w_enc and w_dec, as some of the release spell them."""
    path = folder / "gemma-scope-9b-pt-att" / "layer_2" / "width_16k" / "average_l0_20"
    path.mkdir(parents=True)
    np.savez_compressed(path / "params.npz", **{f"w{k[1:]}" if k[0] == "W" else k: v for k, v in weights().items()})
    return Written(path, "gemma_scope", ("head_out", 2), gemma_formula)


def gemma_scope_2(folder: Path) -> Written:
    path = folder / "gemma-scope-2-270m-pt" / "resid_post" / "layer_1_width_16k_l0_medium"
    path.mkdir(parents=True)
    save_file({k.lower(): v for k, v in weights().items()}, path / "params.safetensors")
    write_json(path / "config.json", {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.1.output"})
    return Written(path, "gemma_scope", ("resid_post", 1), gemma_formula)


def llama_scope(folder: Path) -> Written:
    w = weights()
    norm, threshold = 2.5, 0.33
    config = {
        "d_model": WIDTH,
        "d_sae": FEATURES,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "act_fn": "jumprelu",
        "jump_relu_threshold": threshold,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "sparsity_include_decoder_norm": True,
        "top_k": 50,
        "hook_point_in": "blocks.4.hook_resid_post",
        "hook_point_out": "blocks.4.hook_resid_post",
    }
    write_json(folder / "hyperparams.json", config)
    (folder / "checkpoints").mkdir()
    save_file(lm_saes_tensors(w), folder / "checkpoints" / "final.safetensors")

    def formula(x: Array) -> tuple[Array, Array]:
        # As lm_saes runs it: standardised to the model's units, where the threshold was calibrated.
        n = np.float32(WIDTH**0.5 / norm)
        p = x @ w["W_enc"] + w["b_enc"] / n
        f = p * (p * np.linalg.norm(w["W_dec"], axis=1) > threshold)
        return f * n, f @ w["W_dec"] + w["b_dec"] / n

    return Written(folder, "llama_scope", ("resid_post", 4), formula)


def llama_scope_later(folder: Path) -> Written:
    w = weights()
    norm = 2.0
    config = {
        "d_model": WIDTH,
        "expansion_factor": 3,
        "act_fn": "jumprelu",
        "sparsity_include_decoder_norm": False,
        "apply_decoder_bias_to_pre_encoder": True,
        "hook_point_in": "blocks.4.hook_attn_out",
    }
    write_json(folder / "config.json", config)
    tensors = lm_saes_tensors(w) | {
        "log_jumprelu_threshold": np.log(w["threshold"]),
        "dataset_average_activation_norm.blocks.4.hook_attn_out": np.array(norm, np.float32),
    }
    save_file(tensors, folder / "sae_weights.safetensors")

    def formula(x: Array) -> tuple[Array, Array]:
        n = np.float32(WIDTH**0.5 / norm)
        p = (x * n - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
        f = p * (p > w["threshold"])
        return f, (f @ w["W_dec"] + w["b_dec"]) / n

    return Written(folder, "llama_scope", ("attn_out", 4), formula)


def lm_saes_tensors(w: dict[str, Array]) -> dict[str, Array]:
    transposed = {"encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T}
    biases = {"encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    return {name: np.ascontiguousarray(tensor) for name, tensor in (transposed | biases).items()}


def sparsify(folder: Path) -> Written:
    w = weights()
    folder = folder / "layers.3.mlp"
    config = {
        "activation": "topk",
        "expansion_factor": 3,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": TOP_K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": WIDTH,
    }
    write_json(folder / "cfg.json", config)
    tensors = {
        "encoder.weight": np.ascontiguousarray(w["W_enc"].T),
        "encoder.bias": w["b_enc"],
        "W_dec": w["W_dec"],
        "b_dec": w["b_dec"],
    }
    save_file(tensors, folder / "sae.safetensors")
    return Written(folder, "sparsify", ("mlp_out", 3), topk_formula(w, subtract=True))


def directions(*layers: int) -> dict[int, Array]:
    generator = np.random.default_rng(1)
    return {layer: generator.normal(size=WIDTH).astype(np.float32) for layer in layers}


def write_gguf(path: Path, vectors: dict[int, Array], **strings: str) -> None:
    """As repeng and EasySteer write a control vector."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "controlvector")
    for key, value in strings.items():
        writer.add_string(f"controlvector.{key}", value)
    writer.add_uint32("controlvector.layer_count", len(vectors))
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def repeng(folder: Path) -> Written:
    write_gguf(folder / "happy.gguf", directions(5, 4, 3, 2, 1), model_hint="llama")
    return Written(folder / "happy.gguf", "gguf", ("resid_post", 1))


def easysteer(folder: Path) -> Written:
    native = json.dumps({"version": 1, "component": "hidden_states", "metadata": {"mapping": []}})
    write_gguf(folder / "v.gguf", directions(0, 3), model_hint="m", method="diffmean", easysteer=native)
    return Written(folder, "gguf", ("resid_post", 0))


def plain_vectors(folder: Path) -> Written:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"layers.{layer}": v for layer, v in directions(1, 4).items()}, folder / "v.safetensors")
    return Written(folder / "v.safetensors", "safetensors", ("resid_post", 1))


SAES: list[Callable[[Path], Written]] = [
    saelens_v3,
    saelens_v4_gated,
    saelens_v5_topk,
    saelens_v6_jumprelu,
    saelens_v6_topk_rescaled,
    gemma_scope,
    gemma_scope_attention,
    gemma_scope_2,
    llama_scope,
    llama_scope_later,
    sparsify,
]
VECTORS: list[Callable[[Path], Written]] = [repeng, easysteer, plain_vectors]
