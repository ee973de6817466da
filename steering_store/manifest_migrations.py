"""Manifests that an earlier release wrote, brought to today's schema when they are read; what is stored never changes.

So the digest, which is taken of the stored text, stays the artifact's identity. A field that is added with null as its
default needs no migration; a field that is renamed, or means something else, needs a new major version and one here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import JsonValue
from pydantic_core import from_json, to_json

Content = dict[str, JsonValue]
Migration = Callable[[Content], Content]

MIGRATIONS: Mapping[int, Migration] = {}
"""By the `schema_version` that each one reads; it returns the content of the next. Version 1 is the first there was."""


def migrated(raw: str | bytes, migrations: Mapping[int, Migration] = MIGRATIONS) -> str | bytes:
    """The JSON of a manifest after all the migrations that it needs; the same bytes where it needs none."""
    if not migrations:
        return raw
    content = from_json(raw)
    while isinstance(content, dict) and isinstance(version := content.get("schema_version"), int):
        if version not in migrations:
            break
        content = {**migrations[version](content), "schema_version": version + 1}
    return to_json(content)
