from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from steering_store import Store
from steering_store.errors import ArtifactNotFound, InvalidManifest

Content = dict[str, Any]
Vectors = Callable[..., dict[str, bytes]]


@pytest.fixture
def preset(manifest: Content) -> Content:
    """A preset of mood at its alias production."""
    common = {key: manifest[key] for key in ("schema_version", "model", "default_strength", "provenance")}
    return common | {"kind": "preset", "interventions": [{"artifact": "mood@production", "strength": 2.0}]}


@pytest.fixture
def mood(store: Store, manifest: Content, vectors: Vectors) -> Store:
    """A store with mood@1, in production, and mood@2."""
    for fill in (1.0, 2.0):
        store.publish("mood", manifest, vectors(fill))
    store.set_alias("mood", "production", 1)
    return store


def test_preset_means_what_it_meant_when_it_was_published(mood: Store, preset: Content) -> None:
    version = mood.publish("calm", preset, {}).version
    mood.set_alias("mood", "production", 2)
    (item,) = mood.resolve("calm").manifest.interventions or []
    assert mood.resolve(item.artifact).version == 1
    assert item.as_intervention() == {"artifact": f"mood@{mood.resolve('mood@1').digest}", "strength": 2.0}
    again = mood.publish("calm", preset, {})
    assert (again.created, again.version.version) == (True, 2)
    assert mood.publish("calm", version.manifest, {}).version == version
    assert mood.load_tensors(version) == {}
    assert mood.verify("calm") == []


def test_options_are_kept_as_a_request_spells_them_and_the_condition_is_pinned_too(
    mood: Store, preset: Content
) -> None:
    options = {
        "op": "add_norm",
        "layers": [2],
        "apply": {"prompt_window": [-4, None]},
        "condition": {"artifact": "mood", "threshold": 0.5, "above": False},
    }
    preset["interventions"] = [{"artifact": "mood@1", "options": options}]
    (item,) = mood.publish("calm", preset, {}).version.manifest.interventions or []
    pinned = {"artifact": f"mood@{mood.resolve('mood@2').digest}", "threshold": 0.5, "above": False}
    assert item.as_intervention() == {
        "artifact": f"mood@{mood.resolve('mood@1').digest}",
        **options,
        "condition": pinned,
    }


def test_preset_is_listed_and_has_no_sites(mood: Store, preset: Content) -> None:
    version = mood.publish("calm", preset, {}).version
    assert (version.manifest.layers, version.manifest.files) == ([], [])
    assert [item.ref for item in mood.list_artifacts(kind="preset").items] == ["calm@1"]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"interventions": []}, "interventions"),
        ({"interventions": None}, "interventions"),
        ({"interventions": [{"strength": 1.0}]}, "interventions.0.artifact"),
        ({"interventions": [{"artifact": "Mood@1"}]}, "interventions.0.artifact"),
        ({"interventions": [{"artifact": "mood@@"}]}, "interventions.0.artifact"),
        ({"interventions": [{"artifact": "mood", "strength": float("nan")}]}, "interventions.0.strength"),
        ({"interventions": [{"artifact": "mood", "options": {"strength": 1}}]}, "interventions.0.options"),
        ({"interventions": [{"artifact": "mood", "op": "add"}]}, "interventions.0.op"),
        (
            {"interventions": [{"artifact": "mood", "options": {"condition": {"artifact": "mood@Z"}}}]},
            "interventions.0.options.condition.artifact",
        ),
        (
            {"interventions": [{"artifact": "mood", "options": {"condition": {"artifact": 3}}}]},
            "interventions.0.options.condition.artifact",
        ),
        ({"activation": "relu"}, "activation"),
        ({"labels": "l.jsonl"}, "labels"),
        (
            {"model": {"architecture": "LlamaForCausalLM", "hidden_size": 9, "num_layers": 4}},
            "interventions.0.artifact",
        ),
        ({"kind": "steering_vector"}, "interventions"),
    ],
)
def test_refusal_names_the_field(mood: Store, preset: Content, change: Content, param: str) -> None:
    with pytest.raises(InvalidManifest) as caught:
        mood.publish("calm", preset | change, {})
    assert caught.value.param == param
    assert param in caught.value.message


def test_preset_of_presets_and_of_what_is_not_there_is_refused(mood: Store, preset: Content, vectors: Vectors) -> None:
    mood.publish("calm", preset, {})
    with pytest.raises(InvalidManifest, match="is a preset itself"):
        mood.publish("calmer", preset | {"interventions": [{"artifact": "calm"}]}, {})
    with pytest.raises(ArtifactNotFound, match="interventions.0.artifact.*mood@9"):
        mood.publish("calmer", preset | {"interventions": [{"artifact": "mood@9"}]}, {})
    with pytest.raises(InvalidManifest, match="no field names"):
        mood.publish("calmer", preset, vectors())
    assert [item.name for item in mood.list_artifacts().items] == ["calm", "mood"]


def test_sites_and_interventions_exclude_each_other(store: Store, manifest: Content, preset: Content) -> None:
    for change, param in (({"sites": manifest["sites"]}, "sites"), ({"sites": []}, None)):
        text = json.dumps(preset | change)
        if param is None:
            with pytest.raises(ArtifactNotFound):
                store.publish("calm", text, {})
            continue
        with pytest.raises(InvalidManifest) as caught:
            store.publish("calm", text, {})
        assert caught.value.param == param


def test_artifact_deleted_while_a_preset_is_published_is_not_pinned(
    mood: Store, preset: Content, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset["interventions"] = [{"artifact": "mood@2"}]
    resolve = Store.resolve

    def resolve_and_lose(self: Store, ref: Any) -> Any:
        found = resolve(self, ref)
        self.delete_version("mood", 2)
        return found

    monkeypatch.setattr(Store, "resolve", resolve_and_lose)
    with pytest.raises(ArtifactNotFound):
        mood.publish("calm", preset, {})
    assert mood.list_artifacts(kind="preset").items == []
