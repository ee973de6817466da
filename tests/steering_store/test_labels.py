from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
import pytest
from safetensors.numpy import load, save

from steering_store import ArtifactVersion, Store, labels
from steering_store.errors import ArtifactNotFound, CorruptArtifact, InvalidManifest
from steering_store.labels import Example, Label, write_features

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


def files(lines: bytes) -> dict[str, bytes]:
    weights = {"encoder": np.ones((FEATURES, WIDTH), np.float32), "decoder": np.ones((FEATURES, WIDTH), np.float32)}
    return {"s.safetensors": save(weights | {"encoder_bias": np.zeros(FEATURES, np.float32)}), "labels.jsonl": lines}


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
        (b'{"index": 1, "label": "' + b"x" * 70_000 + b'"}', "line 1: it is longer than"),
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


SHOWN = [
    Label(index=0, label="Questions in French"),
    Label(index=2, label="questions", examples=[Example(text="Is it? Yes", token="?", activation=3.5)]),
    Label(index=3, examples=[Example(text="one 2", token=" 2", activation=1.0)]),
    Label(index=4, label="French towns"),
]


def shown(store: Store, sae: Content) -> ArtifactVersion:
    return store.publish("sae", sae, files(write_features(list(reversed(SHOWN))))).version


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("", [0, 2, 3, 4]),
        ("question", [0, 2]),
        ("FRENCH questions", [0]),
        ("french", [0, 4]),
        ("nothing", []),
        (" ", [0, 2, 3, 4]),
    ],
)
def test_features_are_found_by_all_words_of_their_label(
    store: Store, sae: Content, query: str, found: list[int]
) -> None:
    page = store.find_features(shown(store, sae), query)
    assert ([each.index for each in page.items], page.has_more) == (found, False)


def test_features_come_in_pages_by_index_with_their_examples(store: Store, sae: Content) -> None:
    version = shown(store, sae)
    first = store.find_features(version, limit=2)
    assert (first.items, first.has_more) == (SHOWN[:2], True)
    rest = store.find_features(version, after=first.items[-1].index, limit=2)
    assert (rest.items, rest.has_more) == (SHOWN[2:], False)
    assert store.feature_labels(version) == {0: "Questions in French", 2: "questions", 4: "French towns"}


def test_features_of_an_artifact_without_labels_cannot_be_found(store: Store, sae: Content) -> None:
    del sae["labels"]
    version = store.publish("sae", sae, {"s.safetensors": files(b"")["s.safetensors"]}).version
    with pytest.raises(ArtifactNotFound, match="has no labels"):
        store.find_features(version, "x")


def test_labels_of_an_sae_whose_first_site_is_its_decoders_bias_are_counted_by_its_features(
    store: Store, sae: Content
) -> None:
    bias = sae["sites"][0] | {"role": "decoder_bias", "tensor": "decoder_bias", "shape": [WIDTH]}
    sae["sites"] = [bias, *sae["sites"]]
    content = files(b'{"index": 5, "label": "x"}')
    tensors = load(content["s.safetensors"]) | {"decoder_bias": np.zeros(WIDTH, np.float32)}
    with pytest.raises(InvalidManifest, match="not below 5"):
        store.publish("sae", sae, content | {"s.safetensors": save(tensors)})


@pytest.mark.parametrize(
    ("features", "param"),
    [([{"index": 5, "op": "ablate"}], "default_features.0.index"), ([], "default_features")],
)
def test_default_features_must_be_the_saes(store: Store, sae: Content, features: list[Content], param: str) -> None:
    with pytest.raises(InvalidManifest) as refused:
        store.publish("sae", sae | {"default_features": features}, files(LABELS))
    assert str(refused.value.param).startswith(param)


def test_pages_of_labels_parse_the_file_once(store: Store, sae: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    version = shown(store, sae)
    parsed: list[int] = []
    read = labels.read_features

    def counted(stream: BinaryIO) -> list[Label]:
        parsed.append(1)
        return read(stream)

    monkeypatch.setattr("steering_store.store.read_features", counted)
    pages = [store.find_features(version, after=after, limit=1).items for after in (None, 0, None)]
    assert pages[0] == pages[2] != pages[1]
    assert len(parsed) == 1
    monkeypatch.setattr("steering_store.store.MOST_REMEMBERED_LABELS", 0)
    other = Store(store._database.parent)
    assert [other.find_features(version, limit=1).items for _ in range(2)] == [pages[0]] * 2
    assert len(parsed) == 3
