from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from steering_store.errors import InvalidManifest
from steering_store.manifest import SCHEMA_VERSION, digest, json_schema, parse_manifest, read_manifest
from steering_store.manifest_migrations import MIGRATIONS, migrated

PUBLISHED = Path(__file__).parents[2] / "docs" / "manifest.schema.json"
WRITE_AGAIN = "json.dumps(json_schema(), indent=2, ensure_ascii=False) + newline, into docs/manifest.schema.json"

Content = dict[str, Any]


def test_published_schema_is_the_code_s() -> None:
    assert PUBLISHED.read_text("utf-8") == json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n", WRITE_AGAIN


def test_manifests_in_the_documentation_are_accepted() -> None:
    page = (PUBLISHED.parent / "artifacts.md").read_text("utf-8")
    manifests = [text for text in re.findall(r"^```json\n(.*?)^```", page, re.S | re.M) if "schema_version" in text]
    assert {parse_manifest(text).kind for text in manifests} >= {"steering_vector", "preset"}


def test_schema_names_every_kind_and_forbids_unknown_fields() -> None:
    schema: Any = json_schema()
    assert schema["additionalProperties"] is False
    assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    assert {"preset", "sae", "steering_vector"} < set(schema["properties"]["kind"]["enum"])
    assert {"schema_version", "kind", "model", "default_strength", "provenance"} == set(schema["required"])


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, 99])
def test_manifest_of_an_unknown_major_version_is_refused_by_its_version(manifest: Content, version: int) -> None:
    text = json.dumps(manifest | {"schema_version": version, "unheard_of": True})
    for read in (parse_manifest, read_manifest):
        with pytest.raises(InvalidManifest, match=f"schema_version {version} is unknown") as caught:
            read(text)
        assert caught.value.param == "schema_version"


def test_there_is_a_migration_from_every_earlier_version_and_from_no_other() -> None:
    assert set(MIGRATIONS) == set(range(1, SCHEMA_VERSION))


def test_migrations_are_applied_in_order_up_to_the_last(manifest: Content) -> None:
    """The chain itself, on versions that never existed."""

    def from_minus_one(content: Content) -> Content:
        return {**content, "steps": [*content.get("steps", []), "a"]}

    def from_zero(content: Content) -> Content:
        return {**content, "steps": [*content["steps"], "b"]}

    chain = {-1: from_minus_one, 0: from_zero}
    assert json.loads(migrated(json.dumps({"schema_version": -1}), chain)) == {"schema_version": 1, "steps": ["a", "b"]}
    assert json.loads(migrated(json.dumps(manifest), chain)) == manifest
    for text in ("[]", "3", json.dumps({"schema_version": 7})):
        assert json.loads(migrated(text, chain)) == json.loads(text)


def test_revision_of_the_weights_is_part_of_the_identity_and_its_absence_is_not(manifest: Content) -> None:
    with_revision = manifest | {"model": manifest["model"] | {"revision": "12fd25f77366fa6b3b4b768ec3050bf629380bac"}}
    assert parse_manifest(with_revision).model.revision is not None
    assert digest(parse_manifest(with_revision)) != digest(parse_manifest(manifest))
