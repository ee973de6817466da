"""Pickles of tensors, `.pt` and `.bin`, to safetensors, offline: for `polyhelm artifact convert`, never in the server.

torch.load(weights_only=True) builds tensors and plain containers only, and refuses whatever could run code.
"""

from __future__ import annotations

import json
import pickle
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steering_store.errors import TooLarge, UnsupportedFile
from steering_store.formats.files import Folder

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
    ArithmeticError,
    zipfile.BadZipFile,
    OSError,
)
"""What torch.load raises for what it refuses, and for damaged files."""
_STANDARD = {"encoder.weight", "encoder.bias", "decoder.weight", "bias"}
_TOP_K = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k"}


def convert(source: Path, target: Path, max_bytes: int = 1 << 30) -> list[Path]:
    """Write what a pickle holds into the folder `target`, ready for `polyhelm artifact import`; return the files.

    An SAE of dictionary_learning (`ae.pt`, with `config.json` beside it) is written as SAELens lays one out; anything
    else as `NAME.safetensors`, with the names of nested dictionaries joined by dots, and whole numbers as `layer.N`.
    The file and what it holds may have `max_bytes`. Raises UnsupportedFile for what weights_only refuses, and for
    content that isn't named tensors, TooLarge, or InvalidManifest for a broken `config.json`.
    """
    import torch
    from safetensors.torch import save_file

    _check_size(source.name, source.stat().st_size, max_bytes)
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as archive:
                _check_size(source.name, sum(member.file_size for member in archive.infolist()), max_bytes)
        with warnings.catch_warnings():
            # Of odd protocols torch warns, and then reads them or doesn't.
            warnings.simplefilter("ignore", UserWarning)
            content = torch.load(source, map_location="cpu", weights_only=True)
    except _UNREADABLE as exc:
        reason = (str(exc).splitlines() or [type(exc).__name__])[0][:200]
        raise UnsupportedFile(
            f"{source.name} can't be read with weights_only=True: {reason}; save a dictionary of tensors instead",
            "path",
        ) from None
    found = dict(_tensors(content, "", source.name))
    # A few bytes of a pickle can describe a tensor of any size: as many views of one value.
    _check_size(source.name, sum(tensor.numel() * tensor.element_size() for tensor in found.values()), max_bytes)
    # Copies of their own: safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
    config = _dictionary_learning(tensors, source.with_name("config.json"), source.name)
    target.mkdir(parents=True, exist_ok=True)
    if config is None:
        path = target / f"{source.stem}.safetensors"
        save_file(tensors, path)
        return [path]
    fields, weights = config
    (target / "cfg.json").write_text(json.dumps(fields, indent=2) + "\n", "utf-8")
    save_file(weights, target / "sae_weights.safetensors")
    return [target / "cfg.json", target / "sae_weights.safetensors"]


def _check_size(file: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise TooLarge(f"{file}: {size} bytes, and POLYHELM_MAX_ARTIFACT_BYTES allows {max_bytes}", "path")


def _tensors(content: Any, prefix: str, file: str) -> Iterator[tuple[str, Tensor]]:
    import torch
    from torch import Tensor

    if isinstance(content, Tensor):
        if content.layout is not torch.strided or content.is_quantized or content.is_complex():
            raise UnsupportedFile(f"{file}: {prefix!r} is {content.dtype}, {content.layout}; save it dense", "path")
        yield prefix or "tensor", content
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


def _dictionary_learning(
    tensors: dict[str, Tensor], config: Path, file: str
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """cfg.json and weights in SAELens' layout, or None where this is no SAE of dictionary_learning.

    AutoEncoder: relu(encoder (x - bias)). AutoEncoderTopK: its k largest, with b_dec for bias. BatchTopKSAE: those of
    relu(encoder (x - b_dec)) above `threshold`.
    """
    import torch

    standard = tensors.keys() == _STANDARD
    if not standard and not _TOP_K <= tensors.keys() <= _TOP_K | {"threshold"}:
        return None
    trainer = Folder(config.parent).json(config.name).get("trainer") if config.exists() else None
    trainer = trainer if isinstance(trainer, dict) else {}
    encoder = tensors["encoder.weight"]
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if encoder.ndim != 2 or tensors["decoder.weight"].ndim != 2:
        raise UnsupportedFile(f"{file}: an SAE whose encoder or decoder is no matrix: {shapes}", "path")
    if scalars := [name for name in ("k", "threshold") if name in tensors and tensors[name].numel() != 1]:
        raise UnsupportedFile(f"{file}: {scalars[0]} isn't one number: {shapes}", "path")
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
