"""Facts as rows, and filters as conditions on rows."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from kb.facts import Fact, key_hash
from kb.filters import Filter

TEXTS = ("id", "text", "question", "answer", "language", "subject", "relation", "object", "source", "content_hash")
PLAIN = (*TEXTS, "version", "seq", "superseded_by")
MOMENTS = ("valid_from", "valid_to", "created_at", "updated_at")
COLUMNS = (*PLAIN, *MOMENTS, "deleted", "aliases", "metadata")
SELECTED = ", ".join(COLUMNS)
BATCH = 500
"""Values of one IN list."""


def fact_of(row: sqlite3.Row | dict[str, Any]) -> Fact:
    values = {name: row[name] for name in COLUMNS}
    for name in MOMENTS:
        if values[name] is not None:
            values[name] = datetime.fromisoformat(values[name])
    # Of most facts both are empty.
    values["aliases"] = () if values["aliases"] == "[]" else tuple(json.loads(values["aliases"]))
    values["metadata"] = {} if values["metadata"] == "{}" else json.loads(values["metadata"])
    values["deleted"] = bool(values["deleted"])
    return Fact(**values)


def values_of(fact: Fact) -> dict[str, Any]:
    """A value for each of `COLUMNS`, and `key_hash`."""
    values: dict[str, Any] = {name: getattr(fact, name) for name in PLAIN}
    for name in MOMENTS:
        moment = getattr(fact, name)
        # Of fixed width, so that text compares as time does.
        values[name] = None if moment is None else moment.isoformat(timespec="microseconds")
    return values | {
        "deleted": int(fact.deleted),
        "aliases": json.dumps(fact.aliases, ensure_ascii=False),
        "metadata": json.dumps(fact.metadata, ensure_ascii=False),
        "key_hash": key_hash(fact.key),
    }


def to_json(fact: Fact) -> str:
    """For `revisions`."""
    values = values_of(fact)
    return json.dumps({name: values[name] for name in COLUMNS}, ensure_ascii=False)


def conditions(where: Filter, at: datetime | None = None) -> tuple[str, list[Any]]:
    """SQL that begins with AND, and its parameters; with `at`, only facts that are valid then."""
    parts: list[str] = []
    values: list[Any] = []
    for name, wanted in where.fields():
        if wanted is not None:
            # One parameter, however long the list is: SQLite takes a limited number of them.
            parts.append(f"{name} IN (SELECT value FROM json_each(?))")
            values.append(json.dumps(wanted))
    for key, value in where.metadata.items():
        path = '$."' + key.replace('"', '\\"') + '"'
        parts.append("json_type(metadata, ?) IN (SELECT value FROM json_each(?)) AND json_extract(metadata, ?) = ?")
        values += [path, json.dumps(_json_types(value)), path, value]
    if at is not None:
        moment = at.isoformat(timespec="microseconds")
        parts.append("(valid_from IS NULL OR valid_from <= ?) AND (valid_to IS NULL OR valid_to > ?)")
        values += [moment, moment]
    return "".join(f" AND {part}" for part in parts), values


def in_batches(values: Iterable[Any]) -> Iterator[list[Any]]:
    listed = list(values)
    for start in range(0, len(listed), BATCH):
        yield listed[start : start + BATCH]


def marks(values: list[Any]) -> str:
    return ", ".join("?" * len(values))


def _json_types(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(value).lower()]
    return ["text"] if isinstance(value, str) else ["integer", "real"]
