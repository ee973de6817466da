"""Facts as rows of PostgreSQL, and filters as conditions on rows."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np

from kb.backends.postgres_pool import Connection
from kb.facts import Fact
from kb.filters import Filter

FIELDS = tuple(Fact.__slots__)
SELECTED = ", ".join(FIELDS)


def one(db: Connection, number: int, id: str) -> Fact | None:
    sql = f"SELECT {SELECTED} FROM kb_facts WHERE collection = %s AND id = %s"  # nosec B608: columns, of the code
    row = db.execute(sql, (number, id)).fetchone()
    return None if row is None else fact_of(row)


def fact_of(row: dict[str, Any]) -> Fact:
    for name in ("valid_from", "valid_to", "created_at", "updated_at"):
        if row[name] is not None:
            row[name] = row[name].astimezone(UTC)
    return Fact(**row | {"aliases": tuple(row["aliases"])})


def to_json(fact: Fact) -> dict[str, Any]:
    values = {name: getattr(fact, name) for name in FIELDS}
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in values.items()}


def from_json(values: dict[str, Any]) -> Fact:
    for name in ("valid_from", "valid_to", "created_at", "updated_at"):
        if values[name] is not None:
            values[name] = datetime.fromisoformat(values[name])
    return fact_of(values)


def conditions(where: Filter, at: datetime | None = None) -> tuple[str, list[Any]]:
    """SQL that begins with AND, and its parameters; with `at`, only facts that are valid then."""
    parts: list[str] = []
    values: list[Any] = []
    for name, wanted in where.fields():
        if wanted is not None:
            parts.append(f"{name} = ANY (%s)")
            values.append(wanted)
    for key, value in where.metadata.items():
        parts.append("metadata -> %s = %s::jsonb")
        values += [key, json.dumps(value)]
    if at is not None:
        parts.append("(valid_from IS NULL OR valid_from <= %s) AND (valid_to IS NULL OR valid_to > %s)")
        values += [at, at]
    return "".join(f" AND {part}" for part in parts), values


def vector_text(vector: np.ndarray) -> str:
    return "[" + ",".join(map(repr, vector.tolist())) + "]"
