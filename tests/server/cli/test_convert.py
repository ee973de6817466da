from __future__ import annotations

import ast
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from server.cli.convert import convert
from steering_store.errors import InvalidManifest, StoreError, TooLarge, UnsupportedFile
from steering_store.formats import ImportOptions, import_artifact
from steering_store.formats.reconstruction import features
from steering_store.manifest import ModelSpec
from tests.steering_store.mutations import mutations

ROOT = Path(__file__).parents[3]
WIDTH, FEATURES, TOP_K = 16, 48, 3
OPTIONS = ImportOptions(model=ModelSpec(architecture="LlamaForCausalLM", hidden_size=WIDTH, num_layers=6))


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("ran",))


def test_named_tensors_keep_their_names_and_bits(tmp_path: Path) -> None:
    vector = torch.randn(WIDTH, dtype=torch.float64)
    torch.save({"a": {"b": vector, "note": "x"}, 3: vector.half(), "c": vector.view(4, 4).T}, tmp_path / "v.pt")
    (path,) = convert(tmp_path / "v.pt", tmp_path / "out")
    assert path == tmp_path / "out" / "v.safetensors"
    loaded = load_file(path)
    np.testing.assert_array_equal(loaded["a.b"], vector.numpy())
    np.testing.assert_array_equal(loaded["layer.3"], vector.half().numpy())
    np.testing.assert_array_equal(loaded["c"], vector.view(4, 4).T.numpy())


def test_vectors_by_layer_can_be_imported_after_conversion(tmp_path: Path) -> None:
    torch.save({layer: torch.full((WIDTH,), float(layer)) for layer in (1, 5)}, tmp_path / "v.pt")
    with pytest.raises(UnsupportedFile, match="pickle"):
        import_artifact(tmp_path / "v.pt", OPTIONS)
    convert(tmp_path / "v.pt", tmp_path / "out")
    draft = import_artifact(tmp_path / "out", OPTIONS)
    assert {name: float(vector[0]) for name, vector in draft.tensors.items()} == {"resid_post.1": 1, "resid_post.5": 5}


@pytest.mark.parametrize(
    "content",
    [RunsCode(), {"a": RunsCode()}, [torch.ones(2)], {"a": [torch.ones(2)]}, "text"],
    ids=["code", "code in a dict", "list", "list in a dict", "text"],
)
def test_anything_but_named_tensors_is_refused(
    content: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(content, tmp_path / "v.pt")
    with pytest.raises(UnsupportedFile, match="v.pt"):
        convert(tmp_path / "v.pt", tmp_path / "out")
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 cut off", b"\x80\x02.", b"\x80\x02}q\x00K\x01."])
def test_damaged_file_is_a_clear_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "v.pt").write_bytes(content)
    with pytest.raises(UnsupportedFile, match="weights_only"):
        convert(tmp_path / "v.pt", tmp_path / "out")


@pytest.mark.parametrize("kind", ["AutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"])
def test_sae_of_dictionary_learning_encodes_the_same_after_conversion(kind: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    encoder = torch.nn.Linear(WIDTH, FEATURES)
    decoder = torch.nn.Linear(FEATURES, WIDTH, bias=False)
    bias = torch.randn(WIDTH, generator=generator)
    threshold = 0.4
    state = {"encoder.weight": encoder.weight, "encoder.bias": encoder.bias, "decoder.weight": decoder.weight}
    if kind == "AutoEncoder":
        state["bias"] = bias
    else:
        state |= {"b_dec": bias, "k": torch.tensor(TOP_K), "threshold": torch.tensor(threshold)}
    torch.save({key: value.detach() for key, value in state.items()}, tmp_path / "ae.pt")
    trainer = {"dict_class": kind, "layer": 4, "submodule_name": "resid_post_layer_4", "lm_name": "m"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    convert(tmp_path / "ae.pt", tmp_path / "out")
    draft = import_artifact(tmp_path / "out", OPTIONS)
    assert draft.sae is not None and draft.manifest["sites"][0]["layer"] == 4

    x = torch.randn(200, WIDTH, generator=generator)
    with torch.no_grad():
        acts = encoder(x - bias).relu()
        if kind == "AutoEncoderTopK":
            top = acts.topk(TOP_K, dim=-1)
            acts = torch.zeros_like(acts).scatter_(-1, top.indices, top.values)
        elif kind == "BatchTopKSAE":
            acts = acts * (acts > threshold)
        expected = decoder(acts) + bias
    found = features(draft.sae, x.numpy())
    np.testing.assert_allclose(found, acts.numpy(), atol=1e-5)
    np.testing.assert_allclose(found @ draft.sae.decoder + draft.sae.decoder_bias, expected.numpy(), atol=1e-5)


def test_nothing_but_the_command_can_reach_the_converter() -> None:
    users = set()
    for file in (file for folder in ("server", "methods", "steering_store") for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            imports = isinstance(node, ast.Import | ast.ImportFrom) and "cli" in ast.unparse(node)
            if (imports and "convert" in ast.unparse(node)) or (
                isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
            ):
                users.add(str(file.relative_to(ROOT)))
    assert "server/cli/convert.py" in users
    assert {user for user in users if not user.startswith("server/cli/")} == set()


def sae(path: Path, **changed: torch.Tensor) -> Path:
    tensors = {
        "encoder.weight": torch.ones(FEATURES, WIDTH),
        "encoder.bias": torch.ones(FEATURES),
        "decoder.weight": torch.ones(WIDTH, FEATURES),
        "b_dec": torch.ones(WIDTH),
        "k": torch.tensor(TOP_K),
        "threshold": torch.tensor(0.5),
    }
    torch.save(tensors | {name.replace("__", "."): tensor for name, tensor in changed.items()}, path)
    return path


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"encoder__weight": torch.ones(FEATURES)}, "no matrix"),
        ({"decoder__weight": torch.ones(2, 2, 2)}, "no matrix"),
        ({"k": torch.ones(3)}, "k isn't one number"),
        ({"threshold": torch.ones(0)}, "threshold isn't one number"),
        ({"b_dec": torch.ones(2, 2).to_sparse()}, "save it dense"),
        ({"b_dec": torch.ones(2, dtype=torch.complex64)}, "save it dense"),
    ],
)
def test_sae_of_odd_shapes_is_refused(tmp_path: Path, changed: dict[str, torch.Tensor], words: str) -> None:
    with pytest.raises(UnsupportedFile, match=words):
        convert(sae(tmp_path / "ae.pt", **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\xff", '{"trainer": [1]}', '{"trainer": {"layer": {}}}'])
def test_broken_config_beside_an_sae_is_named_or_says_nothing(tmp_path: Path, text: str) -> None:
    path = sae(tmp_path / "ae.pt")
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    if "trainer" in text:
        assert len(convert(path, tmp_path / "out")) == 2
    else:
        with pytest.raises(InvalidManifest, match=r"config\.json"):
            convert(path, tmp_path / "out")


def test_sizes_are_limits(tmp_path: Path) -> None:
    """Of the file, of what is packed in it, and of what a few bytes of it describe."""
    torch.save({"a": torch.ones(1000)}, tmp_path / "large.pt")
    torch.save({"a": torch.ones(1).expand(1 << 40)}, tmp_path / "views.pt")
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in stored.infolist():
            packed.writestr(member.filename, stored.read(member), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "packed.pt").stat().st_size < 10_000
    for name, limit in (("large", 4000), ("views", 100_000), ("packed", 100_000)):
        with pytest.raises(TooLarge, match=f"{name}.pt"):
            convert(tmp_path / f"{name}.pt", tmp_path / "out", limit)
    assert convert(tmp_path / "large.pt", tmp_path / "out", 10_000)


@pytest.mark.parametrize("zipped", [True, False])
def test_changed_bytes_give_clear_errors_only(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "ae.pt"
    tensors = torch.load(sae(path), weights_only=True)
    torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    original = path.read_bytes()
    outcomes = {"converted": 0, "refused": 0}

    @settings(max_examples=150, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(changes=st.lists(mutations(), min_size=1, max_size=3))
    def fuzz(changes: list[Callable[[bytes], bytes]]) -> None:
        raw = original
        for change in changes:
            raw = change(raw)
        path.write_bytes(raw)
        try:
            convert(path, tmp_path / "out", 1 << 20)
            outcomes["converted"] += 1
        except StoreError as exc:
            assert len(exc.message) < 1000
            outcomes["refused"] += 1

    fuzz()
    assert outcomes["refused"] > 25, outcomes
