"""Pickles of tensors, `.pt` and `.bin`, to safetensors, offline: for `polyhelm artifact convert`, never in the server.

torch.load(weights_only=True) builds tensors and plain containers only, and refuses whatever could run code.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steering_store.errors import UnsupportedFile

if TYPE_CHECKING:
    from torch import Tensor

_UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    LookupError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
)
"""What torch.load raises for what it refuses, and for damaged files."""
_STANDARD = {"encoder.weight", "encoder.bias", "decoder.weight", "bias"}
_TOP_K = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k"}


def convert(source: Path, target: Path) -> list[Path]:
    """Write what a pickle holds into the folder `target`, ready for `polyhelm artifact import`; return the files.

    An SAE of dictionary_learning (`ae.pt`, with `config.json` beside it) is written as SAELens lays one out; anything
    else as `NAME.safetensors`, with the names of nested dictionaries joined by dots, and whole numbers as `layer.N`.
    Raises UnsupportedFile for what weights_only refuses, and for content that isn't named tensors.
    """
    import torch
    from safetensors.torch import save_file

    try:
        content = torch.load(source, map_location="cpu", weights_only=True)
    except _UNREADABLE as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0][:200]
        raise UnsupportedFile(
            f"{source.name} can't be read with weights_only=True: {reason}; save a dictionary of tensors instead",
            "path",
        ) from None
    tensors = dict(_tensors(content, "", source.name))
    target.mkdir(parents=True, exist_ok=True)
    config = _dictionary_learning(tensors, source.with_name("config.json"))
    if config is None:
        path = target / f"{source.stem}.safetensors"
        save_file(tensors, path)
        return [path]
    fields, weights = config
    (target / "cfg.json").write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    save_file(weights, target / "sae_weights.safetensors")
    return [target / "cfg.json", target / "sae_weights.safetensors"]


def _tensors(content: Any, prefix: str, file: str) -> Iterator[tuple[str, Tensor]]:
    from torch import Tensor

    if isinstance(content, Tensor):
        # A copy of its own: safetensors refuses tensors that share memory.
        yield prefix or "tensor", content.detach().clone().contiguous()
    elif isinstance(content, Mapping):
        for key, value in content.items():
            name = f"layer.{key}" if isinstance(key, int) else str(key)
            if isinstance(value, Tensor | Mapping):
                yield from _tensors(value, f"{prefix}.{name}" if prefix else name, file)
            elif not isinstance(value, str | int | float | bool | None):
                raise UnsupportedFile(
                    f"{file}: {name!r} is a {type(value).__name__}; save a dictionary of tensors", "path"
                )
    else:
        # Of a list nobody knows whether its first entry belongs to layer 0 or 1.
        raise UnsupportedFile(f"{file} holds a {type(content).__name__}; save a dictionary of tensors by name", "path")


def _dictionary_learning(tensors: dict[str, Tensor], config: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """cfg.json and weights in SAELens' layout, or None where this is no SAE of dictionary_learning.

    AutoEncoder: relu(encoder (x - bias)). AutoEncoderTopK: its k largest, with b_dec for bias. BatchTopKSAE: those of
    relu(encoder (x - b_dec)) above `threshold`.
    """
    import torch

    standard = tensors.keys() == _STANDARD
    if not standard and not _TOP_K <= tensors.keys() <= _TOP_K | {"threshold"}:
        return None
    trainer = json.loads(config.read_text("utf-8")).get("trainer", {}) if config.exists() else {}
    encoder = tensors["encoder.weight"]
    weights = {
        "W_enc": encoder.T.contiguous(),
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["decoder.weight"].T.contiguous(),
        "b_dec": tensors["bias" if standard else "b_dec"],
    }
    fields: dict[str, Any] = {"architecture": "standard", "d_in": encoder.shape[1], "d_sae": encoder.shape[0]}
    if not standard and trainer.get("dict_class") == "BatchTopKSAE" and "threshold" in tensors:
        fields["architecture"] = "jumprelu"
        weights["threshold"] = torch.full_like(tensors["encoder.bias"], float(tensors["threshold"]))
    elif not standard:
        fields |= {"architecture": "topk", "k": int(tensors["k"])}
    metadata = {"sae_lens_version": "6.0.0", "model_name": trainer.get("lm_name")}
    if trainer.get("submodule_name") == f"resid_post_layer_{trainer.get('layer')}":
        metadata["hook_name"] = f"blocks.{trainer['layer']}.hook_resid_post"
    dtype = str(encoder.dtype).removeprefix("torch.")
    return fields | {"dtype": dtype, "apply_b_dec_to_input": True, "metadata": metadata}, weights
