from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from steering_store import Store
from steering_store.errors import InvalidManifest, InvalidTensor, UnsupportedFile
from steering_store.formats import Draft, ImportOptions, detect, export_saelens, gated, import_artifact
from steering_store.formats.draft import FILE
from steering_store.formats.reconstruction import features
from steering_store.manifest import ModelSpec, parse_manifest
from tests.steering_store.formats import layouts
from tests.steering_store.formats.layouts import FEATURES, MODEL, OPTIONS, SAES, TOP_K, WIDTH, Written

LAYOUTS = pytest.mark.parametrize("layout", SAES, ids=lambda layout: layout.__name__)


def activations(written: Written, tokens: int = 2000) -> layouts.Array:
    """What the SAE was made for: sums of a few of its decoder's rows, and its bias, a little off."""
    generator = np.random.default_rng(2)
    f = generator.exponential(4.0, (tokens, FEATURES)).astype(np.float32)
    f *= generator.random((tokens, FEATURES)) < TOP_K / FEATURES
    w = layouts.weights()
    return (f @ w["W_dec"] + w["b_dec"] + generator.normal(0, 0.05, (tokens, WIDTH))).astype(np.float32)


def published(draft: Draft, store: Store, folder: Path) -> dict[str, layouts.Array]:
    folder.mkdir(exist_ok=True)
    version = store.publish("imported", draft.manifest, draft.write(folder)).version
    return store.load_tensors(version)


@LAYOUTS
def test_sae_of_every_layout_encodes_and_decodes_as_its_project_does(
    layout: Callable[[Path], Written], tmp_path: Path
) -> None:
    written = layout(tmp_path)
    assert detect(written.path) == written.format
    draft = import_artifact(written.path, written.options)
    sae = draft.sae
    assert sae is not None and written.formula is not None
    assert {(site["point"], site["layer"]) for site in draft.manifest["sites"]} == {written.site}
    x = activations(written)
    expected, reconstructed = written.formula(x)
    found = features(sae, x)
    assert 0 < np.count_nonzero(expected) < expected.size
    # Folding a bias rounds otherwise, so a value that lies on its threshold may fall on either side.
    flipped = (found != 0) != (expected != 0)
    assert flipped.mean() < 1e-3
    np.testing.assert_allclose(found[~flipped], expected[~flipped], rtol=1e-4, atol=2e-5)
    rows = ~flipped.any(axis=1)
    np.testing.assert_allclose(
        (found @ sae.decoder + sae.decoder_bias)[rows], reconstructed[rows], rtol=1e-4, atol=1e-4
    )


@LAYOUTS
def test_sae_of_every_layout_publishes_with_what_was_measured(
    layout: Callable[[Path], Written], tmp_path: Path, store: Store
) -> None:
    written = layout(tmp_path)
    asked = []

    def capture(point: str, layer: int) -> layouts.Array:
        asked.append((point, layer))
        return activations(written) / (written.options.norm_factor or 1)

    draft = gated(import_artifact(written.path, written.options), capture)
    assert asked == [written.site]
    loaded = published(draft, store, tmp_path / "out")
    manifest = store.resolve("imported").manifest
    assert manifest.metrics["fvu"] <= 1 and 0 < manifest.metrics["l0"] <= FEATURES / 2
    assert manifest.activation in ("relu", "jumprelu")
    assert draft.sae is not None
    for site in manifest.sites:
        assert site.role is not None
        np.testing.assert_array_equal(loaded[site.tensor], draft.sae.tensors()[site.role])


@LAYOUTS
def test_import_export_import_is_bit_identical(layout: Callable[[Path], Written], tmp_path: Path) -> None:
    written = layout(tmp_path)
    first = gated(import_artifact(written.path, written.options), lambda point, layer: activations(written))
    export_saelens(parse_manifest(first.manifest), first.tensors, tmp_path / "exported")
    second = import_artifact(tmp_path / "exported", OPTIONS)
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    assert first.write(tmp_path / "1")[FILE].read_bytes() == second.write(tmp_path / "2")[FILE].read_bytes()
    assert first.manifest["sites"] == second.manifest["sites"]
    assert first.manifest["activation"] == second.manifest["activation"]


def test_top_k_sae_is_not_published_before_it_is_calibrated(tmp_path: Path, store: Store) -> None:
    written = layouts.sparsify(tmp_path)
    draft = import_artifact(written.path, written.options)
    with pytest.raises(InvalidManifest, match="activation"):
        published(draft, store, tmp_path / "out")


def test_calibrated_top_k_sae_has_k_active_features_on_average_and_says_how(tmp_path: Path) -> None:
    written = layouts.sparsify(tmp_path)
    x = activations(written)
    draft = gated(import_artifact(written.path, written.options), lambda point, layer: x)
    assert draft.manifest["metrics"]["l0"] == pytest.approx(TOP_K, abs=0.01)
    config = draft.manifest["provenance"]["config"]
    assert config["top_k"] == TOP_K and config["calibration_tokens"] == len(x)
    assert draft.sae is not None and draft.sae.threshold is not None
    assert set(draft.sae.threshold.tolist()) == {config["calibrated_threshold"]}
    assert draft.manifest["metrics"]["fvu_top_k"] == pytest.approx(draft.manifest["metrics"]["fvu"], abs=0.2)


def saelens(folder: Path, architecture: str = "jumprelu", **config: object) -> Path:
    fields = {"architecture": architecture, "metadata": {"hook_name": "blocks.1.hook_resid_post"}, **config}
    return layouts.write_saelens(folder, fields, layouts.weights())


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"architecture": "temporal"}, UnsupportedFile, "architecture 'temporal'"),
        ({"architecture": "topk", "activation_fn_str": "tanh-relu"}, UnsupportedFile, "tanh-relu"),
        ({"architecture": "topk"}, InvalidManifest, "without k"),
        ({"architecture": "topk", "k": FEATURES + 1}, InvalidTensor, "k is 49"),
        ({"normalize_activations": "layer_norm"}, UnsupportedFile, "layer_norm"),
        ({"normalize_activations": "expected_average_only_in"}, InvalidManifest, "norm_factor"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_mid"}}, UnsupportedFile, "hook_resid_mid"),
        ({"metadata": {"hook_name": "blocks.6.hook_resid_post"}}, InvalidManifest, "layer"),
        ({"metadata": {}}, InvalidManifest, "point"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 3}}, UnsupportedFile, "head"),
        ({"d_sae": 7}, InvalidManifest, "d_sae"),
        ({"d_in": "wide"}, InvalidManifest, "d_in"),
    ],
)
def test_saelens_feature_that_cannot_be_kept_is_refused(
    config: dict[str, object], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        import_artifact(saelens(tmp_path, **config), OPTIONS)  # type: ignore[arg-type]


def test_scaling_factor_other_than_one_is_refused(tmp_path: Path) -> None:
    tensors = layouts.weights() | {"scaling_factor": np.full(FEATURES, 1.1, np.float32)}
    layouts.write_saelens(tmp_path, {"architecture": "jumprelu", "hook_name": "blocks.1.hook_resid_post"}, tensors)
    with pytest.raises(UnsupportedFile, match="scaling_factor"):
        import_artifact(tmp_path, OPTIONS)


def test_sae_of_another_width_is_refused(tmp_path: Path) -> None:
    model = MODEL.model_copy(update={"hidden_size": 576})
    with pytest.raises(UnsupportedFile, match="16\\] wide, and those of the model at resid_post are 576"):
        import_artifact(saelens(tmp_path), dataclasses.replace(OPTIONS, model=model))


def test_layer_given_against_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidManifest, match="layer: 2 was given"):
        import_artifact(saelens(tmp_path), dataclasses.replace(OPTIONS, layer=2))


@pytest.mark.parametrize("hook", ["hook_mlp_out", "hook_attn_out"])
def test_sae_behind_a_norm_that_polyhelm_steers_before_is_refused(hook: str, tmp_path: Path) -> None:
    folder = saelens(tmp_path, metadata={"hook_name": f"blocks.1.{hook}"})
    gemma = ModelSpec(architecture="Gemma3ForCausalLM", hidden_size=WIDTH, num_layers=6)
    with pytest.raises(UnsupportedFile, match="behind a norm"):
        import_artifact(folder, dataclasses.replace(OPTIONS, model=gemma))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "batchtopk"}, "act_fn"),
        ({"act_fn": "topk"}, "topk"),
        ({"hook_point_out": "blocks.4.hook_mlp_out"}, "transcoder"),
        ({"norm_activation": "token-wise"}, "token-wise"),
        ({"use_glu_encoder": True}, "GLU"),
        ({"dataset_average_activation_norm": {"in": 1.0, "out": 2.0}}, "differ"),
    ],
)
def test_llama_scope_feature_that_cannot_be_kept_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    layouts.llama_scope(tmp_path)
    content = layouts.json.loads((tmp_path / "hyperparams.json").read_text())
    layouts.write_json(tmp_path / "hyperparams.json", content | change)
    with pytest.raises(UnsupportedFile, match=message):
        import_artifact(tmp_path, OPTIONS)


@pytest.mark.parametrize("change", [{"activation": "groupmax"}, {"signed": True}, {"transcode": True}])
def test_sparsify_feature_that_cannot_be_kept_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    path = layouts.sparsify(tmp_path).path
    content = layouts.json.loads((path / "cfg.json").read_text())
    layouts.write_json(path / "cfg.json", content | change)
    with pytest.raises(UnsupportedFile):
        import_artifact(path, OPTIONS)


def test_gemma_scope_transcoder_and_embedding_are_refused(tmp_path: Path) -> None:
    for folder in ("embedding", "transcoder_all"):
        path = tmp_path / folder / "layer_3" / "width_16k"
        path.mkdir(parents=True)
        np.savez(path / "params.npz", **layouts.weights())
        with pytest.raises(UnsupportedFile, match=folder):
            import_artifact(path, dataclasses.replace(OPTIONS, point="resid_post"))


def test_gemma_scope_without_its_folders_takes_the_site_from_the_options(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", **layouts.weights())
    with pytest.raises(InvalidManifest, match="layer"):
        import_artifact(tmp_path, dataclasses.replace(OPTIONS, point="resid_post"))
    draft = import_artifact(tmp_path, dataclasses.replace(OPTIONS, point="resid_post", layer=2))
    assert draft.manifest["sites"][0]["layer"] == 2


def test_identity_sae_has_no_counterpart_in_saelens(tmp_path: Path) -> None:
    draft = import_artifact(saelens(tmp_path), OPTIONS)
    sites = [site for site in draft.manifest["sites"] if site["role"] != "threshold"]
    manifest = parse_manifest({**draft.manifest, "activation": "identity", "sites": sites})
    with pytest.raises(UnsupportedFile, match="identity"):
        export_saelens(manifest, draft.tensors, tmp_path / "out")


def test_options_are_kept(tmp_path: Path) -> None:
    options = ImportOptions(model=MODEL, description="d", license="cc-by-4.0", default_strength=2.0)
    manifest = parse_manifest(import_artifact(saelens(tmp_path), options).manifest)
    assert (manifest.description, manifest.license, manifest.default_strength) == ("d", "cc-by-4.0", 2.0)
    assert manifest.model == MODEL
