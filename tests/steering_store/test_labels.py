from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from steering_store import Store
from steering_store.errors import CorruptArtifact, InvalidManifest

Content = dict[str, Any]
FEATURES, WIDTH = 5, 8


@pytest.fixture
def sae(manifest: Content) -> Content:
    shapes = {"encoder": [FEATURES, WIDTH], "decoder": [FEATURES, WIDTH], "encoder_bias": [FEATURES]}
    site = manifest["sites"][0]
    sites = [
        site | {"role": role, "tensor": role, "shape": shape, "file": "s.safetensors"} for role, shape in shapes.items()
    ]
    return manifest | {"kind": "sae", "activation": "relu", "sites": sites, "labels": "labels.jsonl"}


def files(labels: bytes) -> dict[str, bytes]:
    weights = {"encoder": np.ones((FEATURES, WIDTH), np.float32), "decoder": np.ones((FEATURES, WIDTH), np.float32)}
    return {"s.safetensors": save(weights | {"encoder_bias": np.zeros(FEATURES, np.float32)}), "labels.jsonl": labels}


LABELS = '{"index": 4, "label": "questions"}\n{"index": 0, "label": "Fragen – ¿preguntas?"}'.encode()


def test_labels_are_read_back_and_are_no_tensors(store: Store, sae: Content) -> None:
    version = store.publish("sae", sae, files(LABELS)).version
    assert store.feature_labels(version) == {4: "questions", 0: "Fragen – ¿preguntas?"}
    assert store.feature_labels(version, [4, 3]) == {4: "questions"}
    assert store.load_tensors(version).keys() == {"encoder", "decoder", "encoder_bias"}
    assert store.load_tensors(version, {"decoder": [4]}).keys() == {"decoder"}


def test_artifact_without_labels_has_none(store: Store, sae: Content) -> None:
    del sae["labels"]
    version = store.publish("sae", sae, {"s.safetensors": files(b"")["s.safetensors"]}).version
    assert store.feature_labels(version) == {}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (b'{"index": 5, "label": "x"}', "line 1: index 5 is not below 5"),
        (b'{"index": 1, "label": "x"}\n{"index": 1, "label": "y"}', "line 2: index 1 had a label before"),
        (b'{"index": 1, "label": "x"}\n\n', "line 2"),
        (b'{"index": -1, "label": "x"}', "line 1: index"),
        (b'{"index": 1, "label": ""}', "line 1: label"),
        (b'{"index": 1, "label": "x", "more": 1}', "line 1: more"),
        (b'{"index": "1", "label": "x"}', "line 1: index"),
        (b'[1, "x"]', "line 1"),
        (b"\xff\xfe", "line 1"),
        (b'{"index": 1, "label": "' + b"x" * 20_000 + b'"}', "line 1: it is longer than"),
    ],
)
def test_refusal_names_the_line(store: Store, sae: Content, lines: bytes, reason: str) -> None:
    with pytest.raises(InvalidManifest, match=reason) as caught:
        store.publish("sae", sae, files(lines))
    assert caught.value.param == "labels"
    assert store.list_artifacts().items == []


@pytest.mark.parametrize(
    ("labels", "sent"), [("labels.safetensors", None), ("../l.jsonl", None), ("other.jsonl", "files")]
)
def test_labels_must_be_a_file_of_the_artifact(store: Store, sae: Content, labels: str, sent: str | None) -> None:
    with pytest.raises(InvalidManifest) as caught:
        store.publish("sae", sae | {"labels": labels}, files(LABELS))
    assert caught.value.param == (sent or "labels")


def test_only_a_sae_of_one_layer_has_labels(store: Store, sae: Content, manifest: Content) -> None:
    two = sae | {"sites": sae["sites"] + [site | {"layer": 3, "tensor": "3" + site["tensor"]} for site in sae["sites"]]}
    for content in (manifest | {"labels": "labels.jsonl"}, two):
        with pytest.raises(InvalidManifest) as caught:
            store.publish("x", content, files(LABELS))
        assert caught.value.param == "labels"


def test_labels_are_no_tensors_in_disguise(store: Store, sae: Content) -> None:
    sae["sites"][0]["file"] = "labels.jsonl"
    with pytest.raises(InvalidManifest) as caught:
        store.publish("sae", sae, files(LABELS))
    assert caught.value.param == "sites.0.file"


def test_damaged_labels_are_never_served(store: Store, sae: Content) -> None:
    version = store.publish("sae", sae, files(LABELS)).version
    path = store.file_path(version, "labels.jsonl")
    path.write_bytes(LABELS.replace(b"questions", b"guestions"))
    with pytest.raises(CorruptArtifact, match="labels.jsonl"):
        store.feature_labels(version)
