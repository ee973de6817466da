"""Each method from its spec to a published artifact, on an engine that captures made-up activations."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server import __version__
from server.api.errors import ApiError
from server.fit_methods.registry import METHODS, parse_spec
from server.fits import check_spec, run_fit
from steering_store import ArtifactVersion, Store
from steering_store.errors import ArtifactNotFound
from tests.server.test_fit_jobs import HIDDEN, LAYERS, FakeEngine, identity

ANSWERED = [{"prompt": f"Question {i}?", "positive": "yes", "negative": "no"} for i in range(5)]
TRANSLATED = [{"source": f"habari {i}", "target": f"news {i}"} for i in range(6)]


async def publish(store: Store, method: str, pairs: list[Any] | None, engine: FakeEngine | None, **fields: Any) -> Any:
    spec = parse_spec({"method": method, "name": "made"} | ({} if pairs is None else {"pairs": pairs}) | fields)
    created = datetime(2026, 1, 2, tzinfo=UTC)
    arguments: Any = (spec, engine or FakeEngine(), store, identity(), created, lambda done, total: None)
    return (await run_fit(*arguments, {"fit": "fit-1"})).version


def fitted(folder: Path, method: str, pairs: list[Any] | None, engine: FakeEngine | None = None, **fields: Any) -> Any:
    return asyncio.run(publish(Store(folder), method, pairs, engine, **fields))


def tensors(folder: Path, version: ArtifactVersion) -> dict[tuple[int, str | None], np.ndarray]:
    loaded = Store(folder).load_tensors(version)
    return {(site.layer, site.role): loaded[site.tensor] for site in version.manifest.sites}


@pytest.mark.parametrize(
    ("component", "point", "block"),
    [("heads", "head_out", 2), ("neurons", "mlp_act", 1), ("hidden", "resid_post", 1), ("mlp", "mlp_out", 1)],
)
def test_sadi_publishes_the_selected_numbers_of_an_activation(
    tmp_path: Path, component: str, point: str, block: int
) -> None:
    options = {"component": component, "top_k": 3, "default_strength": 9.0}
    # The engine here is made up, and has no weights.
    options |= {"by": "written"} if component == "neurons" else {}
    version = fitted(tmp_path, "sadi", ANSWERED, options=options)
    manifest = version.manifest
    assert (manifest.kind, manifest.point, manifest.default_strength) == ("neuron_set", point, 9.0)
    found = tensors(tmp_path, version)
    assert sum(len(indices) for indices in found.values()) == 3 * block
    assert manifest.default_layers == manifest.layers
    if component == "heads":
        heads = manifest.provenance.config["heads"]
        numbers = [(layer, head * block + offset) for layer, head in heads for offset in range(block)]
        assert sorted(numbers) == sorted((layer, number) for (layer, _), each in found.items() for number in each)
    assert manifest.model.widths == ({point: HIDDEN} if point in ("head_out", "mlp_act") else None)
    assert manifest.provenance.config["top_k"] == 3
    assert 0 <= manifest.metrics["stability"] <= 1


def test_the_fixed_form_of_sadi_is_a_steering_vector_with_zeros_off_the_mask(tmp_path: Path) -> None:
    mask = fitted(tmp_path, "sadi", ANSWERED, options={"top_k": 2})
    fixed = fitted(tmp_path, "sadi", ANSWERED, options={"top_k": 2, "form": "fixed"})
    assert fixed.manifest.kind == "steering_vector"
    indices = tensors(tmp_path, mask)
    for (layer, _), vector in tensors(tmp_path, fixed).items():
        assert np.flatnonzero(vector).tolist() == indices[layer, None].tolist()


def test_incline_publishes_maps_of_every_layer_with_their_errors_and_languages(tmp_path: Path) -> None:
    options = {"source_language": "sw", "default_layers": [1], "default_strength": 0.25}
    version = fitted(tmp_path, "incline", TRANSLATED, options=options)
    manifest = version.manifest
    assert (manifest.kind, manifest.point, manifest.default_layers) == ("linear_map", "resid_post", [1])
    assert manifest.languages == ["sw", "en"]
    found = tensors(tmp_path, version)
    assert {key: tensor.shape for key, tensor in found.items()} == {
        (layer, role): shape
        for layer in range(LAYERS)
        for role, shape in (("matrix", (HIDDEN, HIDDEN)), ("bias", (HIDDEN,)))
    }
    config = manifest.provenance.config
    assert config["outliers_by_layer"] == [0] * LAYERS and manifest.metrics["outliers"] == 0
    assert len(config["ridge_by_layer"]) == LAYERS and set(config["prior_by_layer"]) <= {"mean", "identity"}
    assert (config["source_language"], config["solver"], config["ridge"]) == ("sw", "ridge", None)
    assert {f"heldout_error.{layer}" for layer in range(LAYERS)} < manifest.metrics.keys()


def test_the_papers_incline_has_no_bias(tmp_path: Path) -> None:
    options = {"source_language": "sw", "solver": "min_norm"}
    version = fitted(tmp_path, "incline", TRANSLATED, options=options)
    assert tensors(tmp_path, version).keys() == {(layer, "matrix") for layer in range(LAYERS)}
    assert version.manifest.provenance.config["prior_by_layer"] == [None] * LAYERS


def test_incline_of_the_embeddings_is_one_map_before_the_first_layer(tmp_path: Path) -> None:
    options = {"source_language": "sw", "component": "embedding", "pooling": "mean"}
    version = fitted(tmp_path, "incline", TRANSLATED, options=options)
    manifest = version.manifest
    assert (manifest.point, manifest.layers, manifest.default_layers) == ("resid_pre", [0], [0])
    assert tensors(tmp_path, version).keys() == {(0, "matrix"), (0, "bias")}


def test_incline_of_a_rank_publishes_factors(tmp_path: Path) -> None:
    version = fitted(tmp_path, "incline", TRANSLATED, options={"source_language": "sw", "rank": 2})
    found = tensors(tmp_path, version)
    assert {role for _, role in found} == {"left", "right", "bias"}
    assert found[0, "left"].shape == (HIDDEN, 2) and found[0, "right"].shape == (2, HIDDEN)
    assert version.manifest.metrics["rank_error"] > 0


OPPOSITES = [{"positive": f"good {i}", "negative": f"bad {i}"} for i in range(6)]
PASSAGES = [{"text": f"running text number {i}"} for i in range(20)]
TRAINING = {"features": 8, "k": 2, "steps": 5, "batch": 16}
COMPLETE: dict[str, tuple[dict[str, list[Any]], dict[str, Any]]] = {
    "caa": ({"pairs": OPPOSITES}, {"pooling": "mean"}),
    "direction": ({"pairs": OPPOSITES}, {"extractor": "pca"}),
    "sadi": ({"pairs": ANSWERED}, {"top_k": 1}),
    "incline": ({"pairs": TRANSLATED}, {"source_language": "sw", "prior": "mean"}),
    "shared_neurons": (
        {"inputs": [{"texts": {"en": f"news {i}", "sw": f"habari {i}"}} for i in range(4)]},
        {"share": 0.25, "active": "written"},
    ),
    "sae": ({"texts": PASSAGES}, {"layer": 1, "examples": 0} | TRAINING),
    "lf_steering": (
        {"pairs": [{"right": f"asked {i}", "wrong": f"{i} asked"} for i in range(6)], "texts": PASSAGES},
        {"layer": 1, "threshold": 0.0} | TRAINING,
    ),
    "expertsteer": (
        {"texts": [{"text": f"a text {i}", "label": ("positive", "negative")[i % 2]} for i in range(24)]},
        {"control": "self_expert", "pairs": 2},
    ),
}


def test_all_methods_that_fit_something_new_are_among_those_whose_provenance_is_tested() -> None:
    assert COMPLETE.keys() == set(METHODS) - {"sae_examples"}, "that one copies the provenance of the SAE it is for"


@pytest.mark.parametrize("method", COMPLETE)
def test_provenance_is_complete(tmp_path: Path, method: str) -> None:
    given, options = COMPLETE[method]
    data = {"name": "made up", "license": "CC0-1.0"}
    fields = {"options": options, "data": data, "license": "MIT", "description": "words"} | given
    version = fitted(tmp_path, method, fields.pop("pairs", None), **fields)
    manifest = version.manifest
    provenance = manifest.provenance
    assert provenance.method == method
    assert options.items() <= provenance.config.items()
    assert provenance.data is not None
    rows = sum(map(len, given.values()))
    assert (provenance.data.name, provenance.data.license, provenance.data.rows) == ("made up", "CC0-1.0", rows)
    spec = parse_spec({"method": method, "name": "x", "options": options} | given)
    assert provenance.data.sha256 == spec.data_digest()
    assert provenance.code_version == __version__
    assert provenance.created_at == datetime(2026, 1, 2, tzinfo=UTC)
    assert (manifest.description, manifest.license, manifest.annotations) == ("words", "MIT", {"fit": "fit-1"})
    assert manifest.model.weights_digest == identity()["weights_digest"]
    assert set(manifest.layers) <= manifest.h_norm.keys()
    seeded = "seed" in type(spec.options).model_fields
    assert provenance.seed == (0 if seeded else None)


@pytest.mark.parametrize(
    ("method", "pairs", "options", "field", "word"),
    [
        ("sadi", ANSWERED, {"top_k": 5}, "options", "top_k 5 must be from 1 to the 4 heads"),
        ("sadi", [{"positive": "same", "negative": "same"}] * 2, {"top_k": 1}, "options", "don't differ"),
        ("incline", TRANSLATED, {"source_language": "sw", "rank": 5}, "options.rank", "above 4"),
    ],
)
def test_what_nothing_can_be_fitted_from_is_422_and_publishes_nothing(
    tmp_path: Path, method: str, pairs: list[Any], options: dict[str, Any], field: str, word: str
) -> None:
    with pytest.raises(ApiError, match=word) as refused:
        fitted(tmp_path, method, pairs, options=options)
    assert (refused.value.status, refused.value.param) == (422, field)
    with pytest.raises(ArtifactNotFound):
        Store(tmp_path).versions("made")


def test_a_layer_without_a_selected_element_cannot_be_the_default(tmp_path: Path) -> None:
    (layer,) = fitted(tmp_path, "sadi", ANSWERED, options={"top_k": 1}).manifest.layers
    with pytest.raises(ApiError, match="nothing was selected at layers"):
        fitted(tmp_path, "sadi", ANSWERED, options={"top_k": 1, "default_layers": [1 - layer]})


def test_a_point_that_is_not_installed_is_400_at_once() -> None:
    async def run() -> None:
        engine: Any = FakeEngine()
        engine.points["head_out"] = {"width": 0, "reason": "name it in POLYHELM_POINTS"}
        with pytest.raises(ApiError, match="head_out.*POLYHELM_POINTS") as refused:
            await check_spec(parse_spec({"method": "sadi", "name": "x", "pairs": ANSWERED}), engine)
        assert refused.value.status == 400
        engine.captures = "this engine can't"
        with pytest.raises(ApiError, match="this engine can't"):
            await check_spec(
                parse_spec({"method": "caa", "name": "x", "pairs": [{"positive": "a", "negative": "b"}] * 2}), engine
            )

    asyncio.run(run())


def test_a_text_that_is_too_long_is_named() -> None:
    async def run() -> None:
        pairs = [*ANSWERED, {"prompt": "q" * 40, "positive": "yes", "negative": "n" * 40}]
        with pytest.raises(ApiError) as refused:
            await check_spec(parse_spec({"method": "sadi", "name": "x", "pairs": pairs}), FakeEngine())  # type: ignore[arg-type]
        assert (refused.value.status, refused.value.param) == (422, "pairs.5.negative")

    asyncio.run(run())
