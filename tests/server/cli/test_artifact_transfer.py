from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.numpy import load_file, save_file

from server.models import model_identity
from server.version import code_version
from steering_store import Store
from tests.server.cli.artifact_cli import FILE, MANIFEST, assert_fails, publish_versions, run, run_json, vector
from tests.steering_store.hub_server import COMMIT, serving

TINY = {"architectures": ["LlamaForCausalLM"], "hidden_size": 8, "num_hidden_layers": 4, "vocab_size": 16}


@pytest.fixture(autouse=True)
def store(data_dir: Path) -> Store:
    store = Store(data_dir / "artifacts")
    publish_versions(store, 2)
    return store


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder that says which model it is, which is all that an import asks of one."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | {"model_type": "llama"}))
    save_file({"w": np.ones(4, np.float32)}, folder / "model.safetensors")
    return str(folder)


def test_push_and_pull_are_idempotent_and_keep_the_digest(store: Store, tmp_path: Path) -> None:
    url, other = f"file://{tmp_path}/shared", str(tmp_path / "other")
    pushed = run_json("push", "mood@2", "--to", url)
    assert (pushed["ref"], pushed["created"], pushed["digest"]) == ("mood@1", True, store.resolve("mood@2").digest)
    assert "was there before" in run("push", "mood@2", "--to", url).stdout
    pulled = run_json("pull", "mood", "--from", url, "--data-dir", other)
    assert (pulled["ref"], pulled["digest"], pulled["created"]) == ("mood@1", pushed["digest"], True)
    assert "was published before" in run("pull", "mood@1", "--from", url, "--data-dir", other).stdout
    assert_fails(run("pull", "mood@7", "--from", url), 1, "mood@7")
    assert_fails(run("push", "mood", "--to", "nowhere"), 1, "URL")


def test_archive_is_exported_and_imported(store: Store, tmp_path: Path) -> None:
    archive, again = tmp_path / "mood.tar", tmp_path / "again.tar"
    run("export", "mood@1", str(archive))
    imported = run_json("import", "borrowed", str(archive), "--data-dir", str(tmp_path / "other"))
    assert (imported["ref"], imported["digest"]) == ("borrowed@1", store.resolve("mood@1").digest)
    assert run("export", "borrowed", str(again), "--data-dir", str(tmp_path / "other")).exit_code == 0
    assert again.read_bytes() == archive.read_bytes()
    assert_fails(run("export", "mood@1", str(archive)), 2, "exists")
    archive.write_bytes(archive.read_bytes()[:-1])
    assert_fails(run("import", "borrowed", str(archive)), 1, "mood.tar")


def test_damaged_artifact_leaves_no_archive(store: Store, tmp_path: Path) -> None:
    version = store.resolve("mood@1")
    store.file_path(version, FILE).write_bytes(b"x" * version.manifest.files[0].size)
    assert_fails(run("export", "mood@1", str(tmp_path / "mood.tar")), 1, FILE)
    assert not (tmp_path / "mood.tar").exists()


@pytest.mark.parametrize(("export", "target"), [("export_archive", "m.tar"), ("export_gguf", "m.gguf"),
                                                ("export_saelens", "m")])  # fmt: skip
def test_export_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, export: str, target: str
) -> None:
    place = tmp_path / target

    def broken(*_: object) -> None:
        if target == "m":
            place.mkdir()
        (place / "cfg.json" if place.is_dir() else place).write_bytes(b"a part of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(f"server.cli.artifact_transfer.{export}", broken)
    assert_fails(run("export", "mood@1", str(place)), 1, "No space")
    assert not place.exists()


def test_control_vector_goes_to_gguf_and_back(store: Store, tmp_path: Path, model: str) -> None:
    path = tmp_path / "mood.gguf"
    assert run_json("export", "mood@2", str(path))["format"] == "gguf"
    assert [tensor.name for tensor in GGUFReader(path).tensors] == ["direction.2"]
    imported = run_json("import", "back", str(path), "--model", model, "--license", "MIT")
    version = store.resolve(imported["ref"])
    assert version.manifest.layers == [2]
    assert version.manifest.license == "MIT"
    assert list(store.load_tensors(version).values())[0].tolist() == [2.0] * 8


def test_folder_in_our_own_layout_is_published(store: Store, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(MANIFEST))
    (folder / FILE).write_bytes(vector(2))
    imported = run_json("import", "mood", str(folder))
    assert (imported["ref"], imported["created"]) == ("mood@2", False)


def test_repository_of_the_hub_is_imported_and_pinned_to_its_commit(
    store: Store, tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"blocks.1.hook_resid_post": np.ones(8, np.float32)}, tmp_path / "v.safetensors")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving({"v.safetensors": (tmp_path / "v.safetensors").read_bytes()}) as address:
        # What HF_ENDPOINT sets, which was read when the client was imported.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        imported = run_json("import", "x", "hf://org/saes@main", "--model", model)
    config = store.resolve(imported["ref"]).manifest.provenance.config
    assert config["source"] == f"hf://org/saes@{COMMIT}"


def test_sae_is_imported_only_with_activations_that_it_reconstructs(store: Store, tmp_path: Path, model: str) -> None:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    folder = tmp_path / "sae"
    folder.mkdir()
    config = {"architecture": "standard", "d_in": 8, "d_sae": 8, "dtype": "float32", "device": "cpu",
              "apply_b_dec_to_input": False, "normalize_activations": "none",
              "metadata": {"sae_lens_version": "6.0.0", "hook_name": "blocks.2.hook_resid_post"}}  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(config))
    zeros = np.zeros(8, np.float32)
    weights = {"W_enc": basis, "W_dec": np.ascontiguousarray(basis.T), "b_enc": zeros, "b_dec": zeros}
    save_file(weights, folder / "sae_weights.safetensors")
    arguments = ("import", "features", str(folder), "--model", model)
    assert_fails(run(*arguments), 1, "--activations")
    # Sparse and positive in that basis, so that these features are the right ones; the first token is left out.
    x = (np.maximum(rng.normal(size=(200, 8)) - 1, 0) @ basis.T).astype(np.float32)
    x[0] = 1e4
    captured = tmp_path / "captured.safetensors"
    weights_digest = model_identity(model)["weights_digest"]
    assert weights_digest is not None
    ours = {"weights_digest": weights_digest}
    save_file({"0.resid_post.2": x, "0.positions": np.arange(200)}, captured)
    assert_fails(run(*arguments, "--activations", str(captured)), 1, "doesn't say with which weights")
    save_file({"0.resid_post.2": x, "0.positions": np.arange(200)}, captured, ours)
    version = store.resolve(run_json(*arguments, "--activations", str(captured))["ref"])
    assert version.manifest.metrics["fvu"] < 0.01
    assert version.manifest.metrics["reconstruction_tokens"] == 199
    sha256 = hashlib.sha256(captured.read_bytes()).hexdigest()
    assert version.manifest.provenance.config["activations_sha256"] == sha256
    assert version.manifest.h_norm == {2: pytest.approx(np.linalg.norm(x[1:], axis=1).mean(), rel=1e-6)}
    foreign = rng.normal(size=(200, 8)).astype(np.float32) * 50 + 300
    save_file({"0.resid_post.2": foreign, "0.positions": np.arange(200)}, captured, ours)
    assert_fails(run(*arguments, "--activations", str(captured)), 1, "unexplained")
    save_file({"0.resid_post.3": x, "0.positions": np.arange(200)}, captured, ours)
    assert_fails(run(*arguments, "--activations", str(captured)), 1, "resid_post.2")
    save_file({"0.resid_post.2": x, "0.positions": np.arange(200)}, captured, {"weights_digest": "sha256:" + "0" * 64})
    assert_fails(run(*arguments, "--activations", str(captured)), 1, "another model")
    assert run_json("export", "features", str(tmp_path / "out"))["format"] == "saelens"
    assert load_file(tmp_path / "out" / "sae_weights.safetensors")["W_enc"].shape == (8, 8)


def test_vector_is_imported_with_what_the_command_says(store: Store, tmp_path: Path, model: str) -> None:
    save_file({"layers.1": np.ones(8, np.float32)}, tmp_path / "v.safetensors")
    captured = tmp_path / "captured.safetensors"
    digest = {"weights_digest": model_identity(model)["weights_digest"] or ""}
    save_file({"0.resid_post.1": np.full((5, 8), 2, np.float32), "0.positions": np.arange(5)}, captured, digest)
    arguments = (
        "import",
        "x",
        str(tmp_path / "v.safetensors"),
        "--model",
        model,
        "--language",
        "sw",
        "--language",
        "en",
    )
    manifest = store.resolve(run_json(*arguments, "--activations", str(captured), "--by", "ana")["ref"]).manifest
    assert manifest.languages == ["sw", "en"]
    assert manifest.h_norm == {1: pytest.approx(np.sqrt(8) * 2)}
    assert manifest.provenance.code_version == code_version()
    assert [entry.by for entry in store.history("x")] == ["ana"]
    assert_fails(run(*arguments[:-1], "??"), 1, "languages")


def test_import_says_what_it_lacks(tmp_path: Path, model: str) -> None:
    assert_fails(run("import", "x", str(tmp_path / "missing")), 1, "does not exist")
    save_file({"v": np.ones(8, np.float32)}, tmp_path / "v.safetensors")
    assert_fails(run("import", "x", str(tmp_path / "v.safetensors")), 1, "--model")
    assert_fails(run("import", "x", str(tmp_path / "v.safetensors"), "--model", model), 1, "site")
    assert_fails(run("import", "x", str(tmp_path / "v.safetensors"), "--model", model, "--point", "here"), 1, "--point")
    done = run_json(
        "import", "x", str(tmp_path / "v.safetensors"), "--model", model, "--point", "resid_post", "--layer", "1"
    )
    assert done["ref"] == "x@1"
    (tmp_path / "v.pt").write_bytes(b"\x80")
    assert_fails(run("import", "x", str(tmp_path / "v.pt"), "--model", model), 1, "pickle")
    assert_fails(run("import", "x", "hf://nobody"), 1, "hf://org/repo")


def test_pickle_of_tensors_is_converted_and_one_with_code_refused(tmp_path: Path, model: str) -> None:
    torch.save({"blocks.1.hook_resid_post": torch.ones(8)}, tmp_path / "v.pt")
    (path,) = run_json("convert", str(tmp_path / "v.pt"), str(tmp_path / "safe"))
    assert run_json("import", "x", path, "--model", model)["ref"] == "x@1"

    class Exploit:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"v": Exploit()}, tmp_path / "evil.pt")
    assert_fails(run("convert", str(tmp_path / "evil.pt"), str(tmp_path / "safe")), 1, "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_limits_of_the_server_hold_here_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("export", "mood@1", str(tmp_path / "mood.tar"))
    monkeypatch.setenv("POLYHELM_MAX_ARTIFACT_BYTES", "1024")
    assert run_json("import", "mood", str(tmp_path / "mood.tar"))["ref"] == "mood@1"
    manifest = MANIFEST | {"model": MANIFEST["model"] | {"hidden_size": 1024}}
    manifest["sites"] = [MANIFEST["sites"][0] | {"shape": [1024]}]
    (tmp_path / "m.json").write_text(json.dumps(manifest))
    save_file({"v": np.ones(1024, np.float32)}, tmp_path / FILE)
    assert_fails(run("publish", "large", "--manifest", str(tmp_path / "m.json"), str(tmp_path / FILE)), 1, "larger")


def test_export_formats_are_named() -> None:
    assert_fails(run("export", "mood", "mood.zip"), 2, "archive")
    assert_fails(run("export", "mood", "mood.gguf", "--layers", "a"), 2, "--layers")
