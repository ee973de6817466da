from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering_store.errors import InvalidManifest, TooLarge
from steering_store.manifest import MAX_MANIFEST_BYTES, canonical_json, digest, parse_manifest

Content = dict[str, Any]
PINNED = "sha256:059b9ab30e98ec6ba77ed22ffe838b8caeedb47e1f25a9144b333a5be0079f94"


def changed(manifest: Content, path: str, value: Any) -> Content:
    """A copy of the manifest with the value at a dotted path replaced."""
    result = copy.deepcopy(manifest)
    *parents, last = path.split(".")
    target: Any = result
    for part in parents:
        target = target[int(part)] if isinstance(target, list) else target[part]
    target[int(last) if isinstance(target, list) else last] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "param"),
    [
        ("schema_version", 2, "schema_version"),
        ("schema_version", "1", "schema_version"),
        ("kind", "lora", "kind"),
        ("extra", 1, "extra"),
        ("model.extra", 1, "model.extra"),
        ("model.hidden_size", 0, "model.hidden_size"),
        ("model.hidden_size", "8", "model.hidden_size"),
        ("model.hidden_size", 16, "sites.0.shape"),
        ("model.weights_digest", "ab" * 32, "model.weights_digest"),
        ("sites", [], "sites"),
        ("sites.0.point", "hook_out", "sites.0.point"),
        ("sites.0.role", "vector", "sites.0.role"),
        ("sites.0.layer", -1, "sites.0.layer"),
        ("sites.0.layer", 4, "sites.0.layer"),
        ("sites.0.layer", True, "sites.0.layer"),
        ("sites.0.shape", [8, 1], "sites.0.shape"),
        ("sites.0.dtype", "I8", "sites.0.dtype"),
        ("sites.0.file", "../v.safetensors", "sites.0.file"),
        ("sites.0.file", "v.pt", "sites.0.file"),
        ("default_strength", float("nan"), "default_strength"),
        ("default_strength", float("inf"), "default_strength"),
        ("default_strength", None, "default_strength"),
        ("strength_range", [5.0, 1.0], "strength_range"),
        ("strength_range", [5.0, 9.0], "default_strength"),
        ("default_layers", [1], "default_layers"),
        ("default_layers", [], "default_layers"),
        ("default_layers", [2, 2], "default_layers"),
        ("h_norm", {"2": 0.0}, "h_norm.2"),
        ("h_norm", {"2": float("inf")}, "h_norm.2"),
        ("h_norm", {"4": 1.0}, "h_norm.4"),
        ("sites.0.point", "resid_pre", "sites.0.layer"),
        ("languages", ["not a language"], "languages.0"),
        ("files", [{"path": "/etc/passwd", "size": 1, "sha256": "0" * 64}], "files.0.path"),
        ("files", [{"path": "v.safetensors", "size": 1, "sha256": "0" * 64}] * 2, "files"),
        ("provenance.config", {"alpha": float("nan")}, "provenance.config"),
        ("provenance.created_at", "2025-01-01T00:00:00", "provenance.created_at"),
        ("provenance.parents", ["sha256:no"], "provenance.parents.0"),
        ("metrics", {"accuracy": float("nan")}, "metrics.accuracy"),
        ("annotations", {"note": 1}, "annotations.note"),
    ],
)
def test_refusal_names_the_field(manifest: Content, path: str, value: Any, param: str) -> None:
    parse_manifest(manifest)
    with pytest.raises(InvalidManifest) as caught:
        parse_manifest(changed(manifest, path, value))
    assert caught.value.param == param
    assert param in caught.value.message


def test_missing_field_is_named(manifest: Content) -> None:
    del manifest["provenance"]
    with pytest.raises(InvalidManifest, match="'provenance': Field required"):
        parse_manifest(manifest)


def test_same_site_twice_is_refused(manifest: Content) -> None:
    manifest["sites"].append(manifest["sites"][0] | {"tensor": "other"})
    with pytest.raises(InvalidManifest, match="resid_post.2 is listed twice"):
        parse_manifest(manifest)


def test_tensor_name_in_two_files_is_refused(manifest: Content) -> None:
    manifest["sites"].append(manifest["sites"][0] | {"layer": 3, "file": "other.safetensors"})
    with pytest.raises(InvalidManifest) as caught:
        parse_manifest(manifest)
    assert caught.value.param == "sites.1.tensor"


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{", "\ud800", b"\xff", '{"a": "\\ud800"}', "[" * 100_000, '{"a":' * 9_000]
)  # fmt: skip
def test_text_that_is_no_manifest_is_refused(text: str | bytes) -> None:
    with pytest.raises(InvalidManifest):
        parse_manifest(text)


def test_value_that_json_cannot_hold_is_refused(manifest: Content) -> None:
    with pytest.raises(InvalidManifest, match="JSON"):
        parse_manifest(manifest | {"annotations": {"a": object()}})


def test_oversized_manifest_is_refused(manifest: Content) -> None:
    with pytest.raises(TooLarge):
        parse_manifest(manifest | {"description": "x" * MAX_MANIFEST_BYTES})


def test_digest_is_the_sha256_of_sorted_compact_utf8(manifest: Content) -> None:
    manifest["description"] = "glücklich"
    parsed = parse_manifest(manifest)
    text = canonical_json(parsed)
    assert "glücklich".encode() in text
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert digest(parsed) == "sha256:" + hashlib.sha256(text).hexdigest()


def test_digest_ignores_order_whitespace_nulls_and_how_a_number_is_written(manifest: Content) -> None:
    variant = dict(reversed(manifest.items())) | {"default_strength": 4, "license": None, "languages": []}
    assert digest(parse_manifest(json.dumps(variant, indent=3))) == digest(parse_manifest(manifest))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("default_strength", 4.5),
        ("provenance.seed", 8),
        ("provenance.created_at", "2025-01-01T00:00:01Z"),
        ("provenance.config", {"a": None}),
        ("license", "MIT"),
    ],
)
def test_digest_depends_on_every_field(manifest: Content, path: str, value: Any) -> None:
    assert digest(parse_manifest(changed(manifest, path, value))) != digest(parse_manifest(manifest))


def test_digest_of_this_schema_never_changes(manifest: Content) -> None:
    # A new release that moves this digest stores every artifact a second time.
    assert digest(parse_manifest(manifest)) == PINNED


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@settings(deadline=None)
@given(config=st.dictionaries(st.text(), json_values), strength=st.floats(allow_nan=False, allow_infinity=False))
def test_canonical_form_is_read_back_as_the_same_manifest(config: Content, strength: float) -> None:
    site = {"point": "resid_post", "layer": 0, "file": "v.safetensors", "tensor": "v", "shape": [4], "dtype": "F16"}
    first = parse_manifest(
        {
            "schema_version": 1,
            "kind": "steering_vector",
            "model": {"architecture": "X", "hidden_size": 4, "num_layers": 1},
            "sites": [site],
            "default_strength": strength,
            "provenance": {"method": "m", "config": config},
        }
    )
    second = parse_manifest(canonical_json(first))
    assert second == first
    assert canonical_json(second) == canonical_json(first)
