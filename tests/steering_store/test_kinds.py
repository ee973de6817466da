"""Artifacts of every kind: what a manifest must say, what the files must hold, and reading only parts of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from steering_store import Store
from steering_store.errors import CorruptArtifact, InvalidManifest, InvalidTensor
from steering_store.manifest import canonical_json, parse_manifest
from steering_store.tensors import read_tensors

HIDDEN, NEURONS, FEATURES, RANK = 8, 12, 20, 3
FILE = "t.safetensors"
DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32"}
Tensors = dict[tuple[int, str | None], np.ndarray]


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


def sae_tensors(layer: int = 2) -> Tensors:
    return {
        (layer, "encoder"): rows(FEATURES, HIDDEN),
        (layer, "encoder_bias"): np.zeros(FEATURES, np.float32),
        (layer, "threshold"): np.zeros(FEATURES, np.float32),
        (layer, "decoder"): rows(FEATURES, HIDDEN),
    }


KINDS: dict[str, Callable[[], tuple[str, str, Tensors, dict[str, Any]]]] = {
    "vector at mlp_out": lambda: ("steering_vector", "mlp_out", {(2, None): rows(HIDDEN)}, {}),
    "vector at head_out": lambda: (
        "steering_vector",
        "head_out",
        {(2, None): rows(NEURONS)},
        {"model.widths": {"head_out": NEURONS}},
    ),
    "neurons": lambda: (
        "neuron_set",
        "mlp_act",
        {(2, None): np.array([0, 7, 11]), (3, None): np.array([], np.int64)},
        {"model.widths": {"mlp_act": NEURONS}},
    ),
    "weighted neurons": lambda: (
        "neuron_set",
        "resid_post",
        {(2, None): np.array([0, 7], np.int32), (2, "weights"): rows(2)},
        {},
    ),
    "dense map": lambda: ("linear_map", "resid_post", {(2, "matrix"): rows(HIDDEN, HIDDEN)}, {}),
    "map with a bias": lambda: (
        "linear_map",
        "resid_post",
        {(2, "bias"): rows(HIDDEN), (2, "matrix"): np.zeros((HIDDEN, HIDDEN), np.float32)},
        {},
    ),
    "factored map with a bias of 0": lambda: (
        "linear_map",
        "resid_post",
        {(2, "bias"): np.zeros(HIDDEN, np.float32), (2, "left"): rows(HIDDEN, RANK), (2, "right"): rows(RANK, HIDDEN)},
        {},
    ),
    "factored map": lambda: (
        "linear_map",
        "attn_out",
        {(2, "left"): rows(HIDDEN, RANK), (2, "right"): rows(RANK, HIDDEN)},
        {},
    ),
    "sae": lambda: ("sae", "resid_post", sae_tensors(), {"activation": "jumprelu"}),
    "relu sae": lambda: (
        "sae",
        "resid_post",
        {key: tensor for key, tensor in sae_tensors().items() if key[1] != "threshold"},
        {"activation": "relu"},
    ),
}


def build(kind: str, point: str, tensors: Tensors, changes: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """A manifest and a file of the tensors, by layer and role."""
    names = {key: f"{key[0]}.{key[1]}" for key in tensors}
    sites = [
        {
            "point": point,
            "layer": layer,
            "file": FILE,
            "tensor": names[layer, role],
            "shape": list(tensor.shape),
            "dtype": DTYPES[tensor.dtype.name],
        }
        | ({} if role is None else {"role": role})
        for (layer, role), tensor in tensors.items()
    ]
    model = {"architecture": "LlamaForCausalLM", "hidden_size": HIDDEN, "num_layers": 4}
    manifest: dict[str, Any] = {
        "schema_version": 1,
        "kind": kind,
        "model": model,
        "sites": sites,
        "default_strength": 1.0,
        "provenance": {"method": "by hand"},
    }
    for path, value in changes.items():
        target, *rest = path.split(".")
        if rest:
            manifest[target][rest[0]] = value
        else:
            manifest[target] = value
    return manifest, save({names[key]: tensor for key, tensor in tensors.items()})


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_is_published_and_read_back(store: Store, name: str) -> None:
    kind, point, tensors, changes = KINDS[name]()
    manifest, file = build(kind, point, tensors, changes)
    version = store.publish("thing", manifest, {FILE: file}).version
    assert (version.manifest.kind, version.manifest.point) == (kind, point)
    assert version.manifest.layers == sorted({layer for layer, _ in tensors})
    loaded = store.load_tensors(version)
    for (layer, role), tensor in tensors.items():
        np.testing.assert_array_equal(loaded[f"{layer}.{role}"], tensor)
        assert loaded[f"{layer}.{role}"].dtype == (np.int64 if tensor.dtype.kind == "i" else np.float32)
    assert parse_manifest(canonical_json(version.manifest)) == version.manifest


WIDE = {"model.widths": {"mlp_act": NEURONS}}


@pytest.mark.parametrize(
    ("kind", "point", "tensors", "changes", "param"),
    [
        ("steering_vector", "head_out", {(2, None): rows(HIDDEN)}, {}, "model.widths"),
        ("steering_vector", "mlp_act", {(2, None): rows(HIDDEN)}, WIDE, "sites.0.shape"),
        ("steering_vector", "mlp_act", {(2, None): rows(NEURONS)}, {"model.widths": {"resid_post": 8}}, "model.widths"),
        ("steering_vector", "resid_post", {(2, "matrix"): rows(HIDDEN, HIDDEN)}, {}, "sites.0.role"),
        ("steering_vector", "resid_post", {(2, None): np.zeros(HIDDEN, np.int64)}, {}, "sites.0.dtype"),
        ("steering_vector", "resid_post", {(2, None): rows(HIDDEN)}, {"activation": "relu"}, "activation"),
        ("neuron_set", "resid_post", {(2, None): rows(HIDDEN)}, {}, "sites.0.dtype"),
        ("neuron_set", "resid_post", {(2, None): np.arange(9)}, {}, "sites.0.shape"),
        ("neuron_set", "resid_post", {(2, "weights"): rows(2)}, {}, "sites"),
        ("neuron_set", "resid_post", {(2, None): np.arange(2), (2, "weights"): rows(3)}, {}, "sites.1.shape"),
        ("linear_map", "resid_post", {(2, "matrix"): rows(HIDDEN, 4)}, {}, "sites.0.shape"),
        ("linear_map", "resid_post", {(2, "left"): rows(HIDDEN, RANK)}, {}, "sites"),
        ("linear_map", "resid_post", {(2, "bias"): rows(HIDDEN)}, {}, "sites"),
        ("linear_map", "resid_post", {(2, "matrix"): rows(HIDDEN, 8), (2, "bias"): rows(9)}, {}, "sites.1.shape"),
        (
            "linear_map",
            "resid_post",
            {(2, "left"): rows(HIDDEN, RANK), (2, "right"): rows(RANK + 1, HIDDEN)},
            {},
            "sites.0.shape",
        ),
        (
            "linear_map",
            "resid_post",
            {(2, "matrix"): rows(HIDDEN, HIDDEN), (2, "left"): rows(HIDDEN, RANK), (2, "right"): rows(RANK, HIDDEN)},
            {},
            "sites",
        ),
        (
            "linear_map",
            "resid_post",
            {(2, "left"): rows(HIDDEN, 0), (2, "right"): rows(0, HIDDEN)},
            {},
            "sites.1.shape",
        ),
        ("linear_map", "resid_post", {(2, None): rows(HIDDEN, HIDDEN)}, {}, "sites.0.role"),
        ("sae", "resid_post", sae_tensors(), {}, "activation"),
        ("sae", "resid_post", sae_tensors(), {"activation": "relu"}, "sites"),
        ("sae", "resid_post", sae_tensors(), {"activation": "topk"}, "activation"),
        ("sae", "resid_post", sae_tensors() | {(2, "threshold"): rows(3)}, {"activation": "jumprelu"}, "sites.2.shape"),
        ("sae", "resid_post", sae_tensors() | {(3, "decoder"): rows(9, 8)}, {"activation": "jumprelu"}, "sites"),
    ],
)
def test_a_manifest_whose_sites_make_no_artifact_of_its_kind_is_refused(
    kind: str, point: str, tensors: Tensors, changes: dict[str, Any], param: str
) -> None:
    manifest, _ = build(kind, point, tensors, changes)
    with pytest.raises(InvalidManifest) as caught:
        parse_manifest(manifest)
    assert str(caught.value.param).startswith(param)


def test_sites_at_two_points_are_refused() -> None:
    manifest, _ = build("steering_vector", "resid_post", {(2, None): rows(HIDDEN), (3, None): rows(HIDDEN)}, {})
    manifest["sites"][1]["point"] = "mlp_out"
    with pytest.raises(InvalidManifest, match="two artifacts") as caught:
        parse_manifest(manifest)
    assert caught.value.param == "sites.1.point"


def test_one_role_twice_at_a_layer_is_refused() -> None:
    manifest, _ = build("linear_map", "resid_post", {(2, "matrix"): rows(HIDDEN, HIDDEN)}, {})
    manifest["sites"].append(manifest["sites"][0] | {"tensor": "other"})
    with pytest.raises(InvalidManifest, match="resid_post.2 with role matrix is listed twice"):
        parse_manifest(manifest)


@pytest.mark.parametrize(("indices", "word"), [([0, 12], "outside 0 to 11"), ([-1], "outside"), ([3, 3], "twice")])
def test_indices_outside_the_activation_or_repeated_are_refused(store: Store, indices: list[int], word: str) -> None:
    manifest, file = build("neuron_set", "mlp_act", {(2, None): np.array(indices)}, WIDE)
    with pytest.raises(InvalidTensor, match=word):
        store.publish("thing", manifest, {FILE: file})


@pytest.mark.parametrize("role", ["encoder", "decoder"])
def test_zeros_are_refused_only_where_they_would_steer_nothing(store: Store, role: str) -> None:
    tensors = sae_tensors()
    tensors[2, role] = np.zeros((FEATURES, HIDDEN), np.float32)
    manifest, file = build("sae", "resid_post", tensors, {"activation": "jumprelu"})
    with pytest.raises(InvalidTensor, match="all zeros"):
        store.publish("thing", manifest, {FILE: file})


def test_rows_of_a_tensor_are_read_alone_and_in_the_order_asked_for(tmp_path: Path) -> None:
    tensors = {"a": rows(50, 6), "b": np.arange(50, dtype=np.float16), "c": np.arange(9, dtype=np.int32)}
    (tmp_path / FILE).write_bytes(save(tensors))
    read = read_tensors(tmp_path / FILE, {"a": [49, 0, 7], "b": [3], "c": None})
    np.testing.assert_array_equal(read["a"], tensors["a"][[49, 0, 7]])
    np.testing.assert_array_equal(read["b"], np.array([3], np.float32))
    np.testing.assert_array_equal(read["c"], tensors["c"])
    for row in (-1, 50):
        with pytest.raises(IndexError, match="outside 0 to 49"):
            read_tensors(tmp_path / FILE, {"a": [row]})


def test_reading_a_few_rows_of_a_large_file_reads_little_more_than_them(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(save({"a": np.ones((4096, 1024), np.float32)}))
    before = _bytes_read()
    read_tensors(tmp_path / FILE, {"a": [1, 4000]})
    assert _bytes_read() - before < 1 << 20


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def test_rows_of_a_damaged_file_are_refused(store: Store) -> None:
    manifest, file = build("sae", "resid_post", sae_tensors(), {"activation": "jumprelu"})
    version = store.publish("thing", manifest, {FILE: file}).version
    assert store.load_tensors(version, {"2.decoder": [3]}).keys() == {"2.decoder"}
    damaged = bytearray(file)
    damaged[-1] ^= 1
    store.file_path(version, FILE).write_bytes(damaged)
    with pytest.raises(CorruptArtifact):
        store.load_tensors(version, {"2.decoder": [3]})
