from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from safetensors.numpy import save_file

from steering_store import Store
from steering_store.errors import InvalidManifest, UnsupportedFile
from steering_store.formats import Draft, detect, export_gguf, gated, import_artifact
from steering_store.formats.draft import FILE
from steering_store.manifest import parse_manifest
from tests.steering_store.formats import layouts
from tests.steering_store.formats.layouts import MODEL, OPTIONS, VECTORS, WIDTH, Written

LAYOUTS = pytest.mark.parametrize("layout", VECTORS, ids=lambda layout: layout.__name__)
EXPECTED = {
    "repeng": layouts.directions(5, 4, 3, 2, 1),
    "easysteer": layouts.directions(0, 3),
    "plain_vectors": layouts.directions(1, 4),
}


def by_layer(draft: Draft) -> dict[int, layouts.Array]:
    return {site["layer"]: draft.tensors[site["tensor"]] for site in draft.manifest["sites"]}


def export(draft: Draft, path: Path, layers: list[int] | None = None) -> Path:
    path.parent.mkdir(exist_ok=True)
    export_gguf(parse_manifest(draft.manifest), draft.tensors, path, layers)
    return path


@LAYOUTS
def test_vectors_come_with_the_layers_that_their_writer_meant(
    layout: Callable[[Path], Written], tmp_path: Path, store: Store
) -> None:
    written = layout(tmp_path)
    assert detect(written.path) == written.format
    draft = import_artifact(written.path, OPTIONS)
    expected = EXPECTED[layout.__name__]
    found = by_layer(draft)
    assert found.keys() == expected.keys()
    for layer, vector in expected.items():
        np.testing.assert_array_equal(found[layer], vector)
    assert {site["point"] for site in draft.manifest["sites"]} == {"resid_post"}
    assert gated(draft, lambda point, layer: pytest.fail("a vector needs no activations")) is draft
    version = store.publish("v", draft.manifest, draft.write(tmp_path)).version
    assert version.manifest.layers == sorted(expected)


def test_exported_control_vector_has_its_layers_where_llama_cpp_applies_them(tmp_path: Path) -> None:
    """The list of llama.cpp's checks in common_control_vector_load_one; its direction.N acts behind layer N from 0."""
    draft = import_artifact(layouts.repeng(tmp_path / "a").path, OPTIONS)
    reader = GGUFReader(export(draft, tmp_path / "out.gguf"))
    architecture = reader.get_field("general.architecture")
    assert architecture is not None and architecture.contents() == "controlvector"
    hint, layer_count = reader.get_field("controlvector.model_hint"), reader.get_field("controlvector.layer_count")
    assert hint is not None and hint.contents() == "llama"
    assert layer_count is not None and layer_count.contents() == 5
    for tensor in reader.tensors:
        prefix, _, number = tensor.name.partition(".")
        assert prefix == "direction" and int(number) > 0
        assert tensor.tensor_type.name == "F32" and list(tensor.shape) == [WIDTH]
        np.testing.assert_array_equal(tensor.data, by_layer(draft)[int(number)])
    assert {tensor.name for tensor in reader.tensors} == {f"direction.{layer}" for layer in range(1, 6)}


@LAYOUTS
def test_import_export_import_is_bit_identical(layout: Callable[[Path], Written], tmp_path: Path) -> None:
    draft = import_artifact(layout(tmp_path / "a").path, OPTIONS)
    layers = [layer for layer in by_layer(draft) if layer > 0]
    first = import_artifact(export(draft, tmp_path / "1" / "v.gguf", layers), OPTIONS)
    second = import_artifact(export(first, tmp_path / "2" / "v.gguf"), OPTIONS)
    files = [
        each.write(folder)[FILE].read_bytes() for each, folder in ((first, tmp_path / "1"), (second, tmp_path / "2"))
    ]
    assert files[0] == files[1]
    assert first.manifest == second.manifest
    assert (tmp_path / "1" / "v.gguf").read_bytes() == (tmp_path / "2" / "v.gguf").read_bytes()
    for layer in layers:
        np.testing.assert_array_equal(by_layer(first)[layer], by_layer(draft)[layer])


def test_layer_0_is_not_exported_to_llama_cpp_which_would_refuse_the_file(tmp_path: Path) -> None:
    draft = import_artifact(layouts.easysteer(tmp_path / "a").path, OPTIONS)
    with pytest.raises(UnsupportedFile, match="layer 0.*\\[3\\]"):
        export(draft, tmp_path / "v.gguf")
    with pytest.raises(InvalidManifest, match="layers"):
        export(draft, tmp_path / "v.gguf", [1])
    export(draft, tmp_path / "v.gguf", [3])


def test_only_vectors_of_the_residual_stream_are_control_vectors(tmp_path: Path) -> None:
    save_file({"mlp_out.2": np.ones(WIDTH, np.float32)}, tmp_path / "v.safetensors")
    draft = import_artifact(tmp_path / "v.safetensors", OPTIONS)
    assert draft.manifest["sites"][0]["point"] == "mlp_out"
    with pytest.raises(UnsupportedFile, match="resid_post"):
        export(draft, tmp_path / "v.gguf")


def test_easysteer_vectors_of_heads_need_the_point(tmp_path: Path) -> None:
    native = '{"version": 1, "component": "attention_heads", "metadata": null}'
    layouts.write_gguf(tmp_path / "v.gguf", layouts.directions(2), model_hint="m", method="iti", easysteer=native)
    with pytest.raises(InvalidManifest, match="attention_heads"):
        import_artifact(tmp_path / "v.gguf", OPTIONS)
    draft = import_artifact(tmp_path / "v.gguf", dataclasses.replace(OPTIONS, point="head_out"))
    assert draft.manifest["sites"][0]["point"] == "head_out"
    assert draft.manifest["provenance"]["config"]["method"] == "iti"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_gguf_of_another_float_type_is_read(dtype: type[np.floating], tmp_path: Path) -> None:
    vector = np.linspace(-1, 1, WIDTH).astype(dtype)
    layouts.write_gguf(tmp_path / "v.gguf", {3: vector}, model_hint="m")
    np.testing.assert_array_equal(by_layer(import_artifact(tmp_path / "v.gguf", OPTIONS))[3], vector.astype(np.float32))


def test_gguf_with_other_alignment_and_lists_is_read(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "v.gguf", "controlvector")
    writer.add_custom_alignment(256)
    writer.add_array("controlvector.names", ["a", "bc"])
    writer.add_array("controlvector.scale", [1.0, 2.0])
    writer.add_bool("controlvector.normalized", True)
    vectors = layouts.directions(1, 2)
    for layer, vector in vectors.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = by_layer(import_artifact(tmp_path / "v.gguf", OPTIONS))
    np.testing.assert_array_equal(found[2], vectors[2])


def test_gguf_model_is_no_control_vector(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedFile, match="llama"):
        import_artifact(tmp_path / "m.gguf", OPTIONS)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("resid_post.3", ("resid_post", 3)),
        ("attn_out.3", ("attn_out", 3)),
        ("blocks.3.hook_resid_post", ("resid_post", 3)),
        ("blocks.3.hook_resid_pre", ("resid_post", 2)),
        ("blocks.0.hook_resid_pre", ("resid_pre", 0)),
        ("model.layers.3.mlp", ("mlp_out", 3)),
        ("transformer.h.3", ("resid_post", 3)),
        ("layer3.v", ("resid_post", 3)),
        ("direction.3", ("resid_post", 3)),
        ("3", ("resid_post", 3)),
    ],
)
def test_names_of_vectors_tell_their_site(name: str, site: tuple[str, int], tmp_path: Path) -> None:
    save_file({name: np.ones(WIDTH, np.float32)}, tmp_path / "v.safetensors")
    (found,) = import_artifact(tmp_path / "v.safetensors", OPTIONS).manifest["sites"]
    assert (found["point"], found["layer"]) == site


def test_one_vector_of_any_name_needs_the_layer(tmp_path: Path) -> None:
    save_file({"truth": np.ones(WIDTH, np.float32)}, tmp_path / "v.safetensors")
    with pytest.raises(UnsupportedFile, match="truth"):
        import_artifact(tmp_path / "v.safetensors", OPTIONS)
    draft = import_artifact(tmp_path / "v.safetensors", dataclasses.replace(OPTIONS, layer=2, point="mlp_out"))
    assert (draft.manifest["sites"][0]["point"], draft.manifest["sites"][0]["layer"]) == ("mlp_out", 2)


@pytest.mark.parametrize(
    "tensors",
    [
        {"layer.1": np.ones((2, WIDTH), np.float32)},
        {"layer.1": np.ones(WIDTH, np.float32), "blocks.1.hook_resid_post": np.ones(WIDTH, np.float32)},
        {"layer.1": np.ones(WIDTH, np.float32), "mlp_out.2": np.ones(WIDTH, np.float32)},
        {"layer.1": np.ones(WIDTH + 1, np.float32)},
        {},
    ],
)
def test_file_that_is_not_one_vector_a_layer_is_refused(tensors: dict[str, layouts.Array], tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "v.safetensors")
    with pytest.raises(UnsupportedFile):
        import_artifact(tmp_path / "v.safetensors", OPTIONS)


def test_vector_beyond_the_models_layers_is_refused(tmp_path: Path) -> None:
    layouts.write_gguf(tmp_path / "v.gguf", layouts.directions(1, MODEL.num_layers), model_hint="m")
    with pytest.raises(InvalidManifest, match="num_layers"):
        import_artifact(tmp_path / "v.gguf", OPTIONS)
