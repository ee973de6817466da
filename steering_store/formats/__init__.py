"""Artifacts in other projects' formats: told apart, read without pickles, and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from steering_store.errors import UnsupportedFile
from steering_store.formats.draft import Draft, ImportOptions, with_config
from steering_store.formats.files import Folder
from steering_store.formats.gemma_scope import import_gemma_scope
from steering_store.formats.gguf_vectors import export_gguf, import_gguf
from steering_store.formats.llama_scope import import_llama_scope
from steering_store.formats.reconstruction import Capture, gated, with_norms
from steering_store.formats.saelens import export_saelens, import_saelens
from steering_store.formats.safetensors_vectors import import_safetensors
from steering_store.formats.sparsify import import_sparsify
from steering_store.reference import pickle_refused

__all__ = [
    "FORMATS",
    "Capture",
    "Draft",
    "Format",
    "ImportOptions",
    "detect",
    "export_gguf",
    "export_saelens",
    "gated",
    "import_artifact",
    "with_config",
    "with_norms",
]

Format = Literal["saelens", "gemma_scope", "llama_scope", "sparsify", "gguf", "safetensors"]
FORMATS: dict[Format, Callable[[Path, ImportOptions], Draft]] = {
    "saelens": import_saelens,
    "gemma_scope": import_gemma_scope,
    "llama_scope": import_llama_scope,
    "sparsify": import_sparsify,
    "gguf": import_gguf,
    "safetensors": import_safetensors,
}
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
_FOLDERS: tuple[tuple[Format, tuple[str, ...]], ...] = (
    ("sparsify", ("cfg.json", "sae.safetensors")),
    ("saelens", ("cfg.json", "sae_weights.safetensors")),
    ("gemma_scope", ("params.npz",)),
    ("gemma_scope", ("params.safetensors",)),
    ("llama_scope", ("hyperparams.json",)),
    ("llama_scope", ("config.json", "sae_weights.safetensors")),
)
"""The files that tell a format by its folder; the first that are all there."""


def import_artifact(path: Path, options: ImportOptions, format: Format | None = None) -> Draft:
    """Read a file or folder of another project; the format is detected where it isn't given.

    The draft of an SAE still has to pass `gated`. Raises UnsupportedFile, InvalidManifest, InvalidTensor or TooLarge.
    """
    file, name = _artifact(path)
    # Values that overflow become infinite, and those are refused: no need for warnings as well.
    with np.errstate(all="ignore"):
        return FORMATS[format or name or detect(path)](file, options)


def detect(path: Path) -> Format:
    """The format of a file or folder, by names. Raises UnsupportedFile where it is none, or a pickle."""
    name = _artifact(path)[1]
    if name is None:
        raise UnsupportedFile(f"{path.name!r} is in no format that polyhelm imports: {', '.join(FORMATS)}", "path")
    return name


def _artifact(path: Path) -> tuple[Path, Format | None]:
    """The path to give to an importer, and the format if known; a folder of one vector file stands for that file."""
    if path.suffix.lower() in _PICKLES:
        raise pickle_refused(path.name)
    folder = Folder(path if path.is_dir() else path.parent)
    for name, files in _FOLDERS:
        if all(map(folder.has, files)) and (path.is_dir() or path.name in files):
            return path, name
    if path.suffix == ".gguf":
        return path, "gguf"
    if path.suffix == ".safetensors":
        return path, "safetensors"
    if not path.is_dir():
        return path, None
    vectors = folder.names(".gguf") + folder.names(".safetensors")
    if len(vectors) == 1:
        return _artifact(path / vectors[0])
    if any(folder.names(suffix) for suffix in _PICKLES):
        raise pickle_refused(next(name for suffix in _PICKLES for name in folder.names(suffix)))
    return path, None
