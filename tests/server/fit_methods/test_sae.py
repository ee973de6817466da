"""SAEs, examples and LF-Steering from specs to published artifacts, on made-up activations with a known answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from methods import lf_steering, sae_training
from methods.sae import Sae
from server.api.errors import ApiError
from server.engine.capture import CaptureSpec
from server.fit_methods import sae_rows
from server.fit_methods.registry import parse_spec
from server.fits import run_fit
from steering_store import ArtifactVersion, Store
from tests.methods.test_sae_training import ATOMS, WIDTH, dictionary
from tests.server.test_fit_jobs import FakeEngine, identity, stored

LETTERS = "abcdefghijklmnopqrstuvwxyz012345"
LAYER = 1
TRAINING = {"features": 48, "k": 3, "steps": 400, "batch": 256, "learning_rate": 3e-3}


class Tokenizer:
    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()


class Atomic(FakeEngine):
    """At LAYER each token is the sum of three atoms of a dictionary: its own letter's, and two that its place decides.
    At other layers, noise.
    """

    hidden_size, tokenizer = WIDTH, Tokenizer()  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__()
        self.points = {point: {"width": WIDTH} for point in self.points}

    async def run_capture(self, ids: list[int], spec: CaptureSpec, *, detokenize: bool) -> SimpleNamespace:
        self.captured += 1
        tensors = {}
        for point, layer in spec.sites:
            rows = self.rows(ids) if layer == LAYER else np.random.default_rng(ids).standard_normal((len(ids), WIDTH))
            rows = rows.astype(np.float32)
            tensors[f"{point}.{layer}"] = stored(rows if spec.keep == "rows" else rows[-1])
            tensors[f"{point}.{layer}.norm"] = stored(np.float32(1))
        return SimpleNamespace(tensors=tensors)

    @staticmethod
    def rows(ids: list[int]) -> np.ndarray:
        atoms = dictionary()
        rng = np.random.default_rng(ids)
        own = [LETTERS.index(chr(each)) for each in ids]
        return np.stack([2.0 * atoms[each] + 0.7 * atoms[rng.choice(ATOMS, 2)].sum(0) for each in own])


def passages(count: int = 60, length: int = 60) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    return [{"text": "".join(rng.choice(list(LETTERS), length))} for _ in range(count)]


def publish(folder: Path, engine: FakeEngine, method: str, data: dict[str, Any], **options: Any) -> ArtifactVersion:
    spec = parse_spec({"method": method, "name": method.replace("_", "-"), "options": options, **data})
    spec = parse_spec(json.loads(spec.model_dump_json()))
    arguments: Any = (spec, engine, Store(folder / "store"), identity(), datetime(2026, 1, 2, tzinfo=UTC))
    return asyncio.run(run_fit(*arguments, lambda done, total: None)).version


def loaded(folder: Path, version: ArtifactVersion) -> Sae:
    tensors = Store(folder / "store").load_tensors(version)
    parts = {site.role: tensors[site.tensor] for site in version.manifest.sites}
    bias = parts.get("decoder_bias", np.zeros(WIDTH, np.float32))
    return Sae(
        "jumprelu", parts["encoder"], parts["encoder_bias"], parts["decoder"], bias, threshold=parts["threshold"]
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ArtifactVersion]:
    folder = tmp_path_factory.mktemp("sae")
    return folder, publish(folder, Atomic(), "sae", {"texts": passages()}, layer=LAYER, examples=3, **TRAINING)


def test_an_sae_is_published_with_its_quality_and_what_its_features_fire_on(
    trained: tuple[Path, ArtifactVersion],
) -> None:
    folder, version = trained
    manifest, sae = version.manifest, loaded(folder, version)
    assert (manifest.kind, manifest.activation, manifest.default_layers) == ("sae", "jumprelu", [LAYER])
    assert manifest.metrics["fvu"] < 0.35 and 1 < manifest.metrics["l0"] < 6
    assert manifest.metrics["heldout_rows"] == pytest.approx(6 * 59, abs=20)
    assert list(manifest.h_norm) == [LAYER]
    store = Store(folder / "store")
    letters = {index: np.abs(sae.decoder @ dictionary().T)[index].argmax() for index in range(len(sae.decoder))}
    told = [each for each in store.find_features(version).items if each.examples[0].activation > 1.5]
    right = [each.examples[0].token == LETTERS[letters[each.index]] for each in told]
    assert len(right) > 10 and np.mean(right) > 0.9
    for each in told:
        values = [example.activation for example in each.examples]
        assert values == sorted(values, reverse=True) and len(values) <= 3
        assert all(example.token in example.text for example in each.examples)


def test_an_interrupted_training_goes_on_from_its_rows_and_ends_with_the_same_sae(
    tmp_path: Path, trained: tuple[Path, ArtifactVersion], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(Exception):
        pass

    spec = {"method": "sae", "name": "sae", "texts": passages(), "options": {"layer": LAYER, "examples": 3, **TRAINING}}
    arguments: Any = (
        parse_spec(spec),
        Atomic(),
        Store(tmp_path / "store"),
        identity(),
        datetime(2026, 1, 2, tzinfo=UTC),
    )
    advance, steps = sae_training._Run.advance, []

    def counted(run: Any) -> None:
        steps.append(run.step)
        advance(run)

    monkeypatch.setattr(sae_training._Run, "advance", counted)
    monkeypatch.setattr(
        sae_training.train, "__kwdefaults__", sae_training.train.__kwdefaults__ | {"checkpoint_every": 50}
    )

    def progress(done: int, total: int) -> None:
        if total == TRAINING["steps"] and done == 130:
            raise Killed

    with pytest.raises(Killed):
        asyncio.run(run_fit(*arguments, progress, work=tmp_path / "work"))
    engine = Atomic()
    arguments = (arguments[0], engine, *arguments[2:])
    version = asyncio.run(run_fit(*arguments, lambda done, total: None, work=tmp_path / "work")).version
    assert engine.captured == 0 and steps[130] == 100, "rows were kept, and training goes on from the checkpoint"
    folder, whole = trained
    np.testing.assert_array_equal(loaded(tmp_path, version).encoder, loaded(folder, whole).encoder)
    assert not (tmp_path / "work").exists()


def test_examples_are_added_to_a_published_sae_and_its_labels_stay(
    trained: tuple[Path, ArtifactVersion], tmp_path: Path
) -> None:
    folder, version = trained
    store = Store(folder / "store")
    tensors = store.file_path(version, "sae.safetensors").read_bytes()
    labels = b'{"index": 2, "label": "two"}\n{"index": 47, "label": "last"}\n'
    bare = version.manifest.model_copy(update={"files": []})
    store.publish("named", bare, {"sae.safetensors": tensors, "labels.jsonl": labels})
    shown = publish(folder, Atomic(), "sae_examples", {"texts": passages(20)}, sae="named@1", examples=2)
    assert store.feature_labels(shown) == {2: "two", 47: "last"}
    found = store.find_features(shown).items
    assert len(found) > 10 and max(len(each.examples) for each in found) == 2
    assert shown.manifest.provenance.parents == [store.resolve("named@1").digest]
    np.testing.assert_array_equal(loaded(folder, shown).encoder, loaded(folder, version).encoder)


def test_what_examples_were_made_from_is_in_the_manifest(trained: tuple[Path, ArtifactVersion]) -> None:
    folder, version = trained
    data = {"texts": passages(20), "data": {"name": "letters", "license": "CC0-1.0"}}
    shown = publish(folder, Atomic(), "sae_examples", data, sae=version.ref, examples=3)
    manifest, own = Store(folder / "store").resolve(shown.ref).manifest, version.manifest
    provenance = manifest.provenance
    assert provenance.method == "sae_examples" and provenance.parents == [version.digest]
    # What it was trained with stays, and what is new is said.
    decisive = {"sae": f"{version.name}@{version.digest}", "examples": 3}
    assert provenance.config == own.provenance.config | decisive and provenance.config["steps"] == TRAINING["steps"]
    spec = parse_spec({"method": "sae_examples", "name": "x", "options": {"sae": "x"}} | data)
    assert provenance.data is not None and own.provenance.data is not None
    assert (provenance.data.name, provenance.data.license, provenance.data.rows) == ("letters", "CC0-1.0", 20)
    assert provenance.data.sha256 == spec.data_digest() != own.provenance.data.sha256
    assert provenance.code_version == own.provenance.code_version and provenance.created_at
    assert (manifest.metrics, manifest.activation, manifest.model) == (own.metrics, own.activation, own.model)
    assert manifest.labels == "labels.jsonl" and str(LAYER) in {str(layer) for layer in manifest.h_norm}


def contrasts(letter: str = "q", count: int = 12) -> list[dict[str, str]]:
    """The right prompts end with the letter, the wrong ones with others."""
    stems = [each["text"][:9] for each in passages(count)]
    return [{"right": stem + letter, "wrong": stem + "abcdef"[number % 6]} for number, stem in enumerate(stems)]


def test_lf_steering_takes_the_features_that_tell_right_from_wrong(trained: tuple[Path, ArtifactVersion]) -> None:
    folder, source = trained
    version = publish(folder, Atomic(), "lf_steering", {"pairs": contrasts()}, sae="sae", most=4)
    manifest, config = version.manifest, version.manifest.provenance.config
    key: Any = config["key"]
    sae = loaded(folder, source)
    atom = dictionary()[LETTERS.index("q")]
    assert key["features"][0] == int((sae.decoder @ atom / np.linalg.norm(sae.decoder, axis=1)).argmax())
    assert key["gains"] == sorted(key["gains"], reverse=True) and len(key["features"]) <= 4
    assert (manifest.kind, manifest.default_layers, manifest.provenance.parents) == ("sae", [LAYER], [source.digest])
    assert manifest.default_features is not None and len(manifest.default_features) == 2 * len(key["features"])
    assert {(each.op, each.value) for each in manifest.default_features} == {("scale", 1.0)}
    features = lf_steering.Features(np.array(key["features"]), np.array(key["gains"], np.float32))
    expected = lf_steering.delta_rows(sae, features)
    np.testing.assert_allclose(loaded(folder, version).decoder, expected.decoder, rtol=1e-6)
    x = Atomic.rows(list(b"hello0world"))[1:].astype(np.float32)
    rows = loaded(folder, version)
    steered = x + 1.5 * rows.encode(x) @ rows.decoder
    np.testing.assert_allclose(steered, lf_steering.delta(sae, x, features, 1.5), atol=1e-4)


def test_rows_are_split_into_mapped_files_without_sinks(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ends = np.cumsum(rng.integers(1, 9, 40)).tolist()
    values = rng.standard_normal((ends[-1], 5)).astype(np.float32)
    values[[3, ends[8] + 0]] *= 500
    rows = sae_rows.Rows(values, ends, [[0]] * 40)
    train, held_out = rows.split(tmp_path)
    assert isinstance(train, np.memmap) and isinstance(held_out, np.memmap)
    ordinary = np.linalg.norm(values, axis=1) < 100
    for found, wanted in ((train, False), (held_out, True)):
        passages = [
            rows.of(n)[ordinary[ends[n - 1] if n else 0 : ends[n]]] for n in range(40) if (n % 10 == 9) == wanted
        ]
        np.testing.assert_array_equal(found, np.concatenate(passages))
    assert len(train) + len(held_out) == len(values) - 2
    few, none = sae_rows.Rows(values[: ends[4]], ends[:5], [[0]] * 5).split(tmp_path)
    assert len(few) == ends[4] - 1 and none.shape == (0, 5)


def test_lf_steering_in_the_papers_form_replaces_the_activation(trained: tuple[Path, Any]) -> None:
    folder, source = trained
    options = {"sae": "sae", "most": 4, "form": "literal", "alpha": 1.5}
    version = publish(folder, Atomic(), "lf_steering", {"pairs": contrasts()}, **options)
    manifest, config = version.manifest, version.manifest.provenance.config
    assert manifest.default_features == "all" and manifest.default_strength == 1
    assert (config["form"], config["alpha"]) == ("literal", 1.5)
    key: Any = config["key"]
    features = lf_steering.Features(np.array(key["features"]), np.array(key["gains"], np.float32))
    rows, sae = loaded(folder, version), loaded(folder, source)
    assert len(rows.encoder) == len(sae.encoder) + 1 + sae.encoder.shape[1] + 2 * len(key["features"])
    x = Atomic.rows(list(b"hello0world"))[1:].astype(np.float32)
    steered = x + rows.encode(x) @ rows.decoder
    np.testing.assert_allclose(steered, lf_steering.literal(sae, x, features, 1.5), atol=1e-4)


def test_lf_steering_finds_the_layer_by_paraphrases_and_trains_there(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    stems = ["".join(rng.choice(list(LETTERS), 6)) for _ in range(120)]
    paraphrases = [
        {"first": f"{stem}x", "second": f"{stem[::-1]}{'x' if number % 2 else 'k'}", "consistent": bool(number % 2)}
        for number, stem in enumerate(stems)
    ]
    data = {"pairs": contrasts(), "paraphrases": paraphrases, "texts": passages(40)}
    version = publish(tmp_path, Atomic(), "lf_steering", data, **TRAINING | {"steps": 150})
    metrics = version.manifest.metrics
    assert metrics["consistency_best_layer"] == LAYER and version.manifest.default_layers == [LAYER]
    assert metrics[f"consistency_accuracy.{LAYER}"] > 0.9 > metrics["consistency_accuracy.0"]
    assert metrics["fvu"] < 0.7 and metrics["key_features"] >= 1
    data_source = version.manifest.provenance.data
    assert data_source is not None and data_source.rows == 12 + 120 + 40


@pytest.mark.parametrize(
    ("data", "options", "word"),
    [
        ({}, {}, "either options.sae"),
        ({"texts": passages(2)}, {"sae": "x"}, "either options.sae"),
        ({}, {"sae": "x", "layer": 1}, "options.layer is the SAE's own"),
        ({"texts": passages(2)}, {}, "paraphrases to find the layer"),
        ({}, {"sae": "x", "most": 129}, "less than or equal to 128"),
        ({}, {"sae": "x", "alpha": 2.0}, "alpha is part of the literal form only"),
    ],
)
def test_lf_steering_needs_one_way_to_an_sae(data: dict[str, Any], options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        parse_spec({"method": "lf_steering", "name": "x", "pairs": contrasts(), "options": options, **data})


@pytest.mark.parametrize(
    ("method", "data", "options", "field", "word"),
    [
        ("sae", {"texts": passages(3)}, {"layer": LAYER, **TRAINING, "batch": 64}, "options", "at least 10 passages"),
        ("sae", {"texts": passages(20)}, {"layer": 2, **TRAINING}, "options.layer", "outside the model's 2"),
        ("sae", {"texts": passages(20)}, {"layer": LAYER, **TRAINING, "k": 49}, "options", "k 49"),
        ("sae_examples", {"texts": passages(20)}, {"sae": "nothing"}, "options.sae", "nothing"),
        ("lf_steering", {"pairs": contrasts()}, {"sae": "nothing"}, "options.sae", "nothing"),
        ("lf_steering", {"pairs": contrasts()}, {"sae": "sae", "threshold": 1e6}, "options.threshold", "lower it"),
    ],
)
def test_what_nothing_can_be_fitted_from_names_its_field(
    trained: tuple[Path, ArtifactVersion], method: str, data: dict[str, Any], options: Any, field: str, word: str
) -> None:
    with pytest.raises(ApiError, match=word) as refused:
        publish(trained[0], Atomic(), method, data, **options)
    assert (refused.value.status, refused.value.param) == (422, field)


def test_an_sae_of_other_weights_is_refused(trained: tuple[Path, ArtifactVersion]) -> None:
    folder, version = trained
    store = Store(folder / "store")
    model = version.manifest.model.model_copy(update={"weights_digest": "sha256:" + "b" * 64})
    files = {path: store.file_path(version, path) for path in ("sae.safetensors", "labels.jsonl")}
    store.publish("foreign", version.manifest.model_copy(update={"files": [], "model": model}), files)
    with pytest.raises(ApiError, match="made for another model"):
        publish(folder, Atomic(), "lf_steering", {"pairs": contrasts()}, sae="foreign")
