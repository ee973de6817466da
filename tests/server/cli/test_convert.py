from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from server.cli.convert import convert
from steering_store.errors import UnsupportedFile
from steering_store.formats import ImportOptions, import_artifact
from steering_store.formats.reconstruction import features
from steering_store.manifest import ModelSpec

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
