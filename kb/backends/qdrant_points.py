"""Facts as points of Qdrant, and filters as conditions on points."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from qdrant_client import models

from kb.errors import InvalidFilter
from kb.facts import Fact, key_hash
from kb.filters import Filter

_NAMESPACE = uuid.UUID("5f1c3f0e-6d8a-4a53-9a55-0b4d0b1f7f10")
_MOMENTS = ("valid_from", "valid_to", "created_at", "updated_at")
_ALWAYS = 1e12
"""Seconds from 1970 that no datetime has."""


def point_id(text: str) -> str:
    return str(uuid.uuid5(_NAMESPACE, text))


def point(name: str, fact: Fact, vector: Any, *, passed: bool = False) -> models.PointStruct:
    payload = {field: getattr(fact, field) for field in Fact.__slots__}
    for field in _MOMENTS:
        payload[field] = None if payload[field] is None else payload[field].isoformat()
    payload |= {
        "aliases": list(fact.aliases),
        "key_hash": key_hash(fact.key).hex(),
        "passed": passed,
        "begins": fact.valid_from.timestamp() if fact.valid_from else -_ALWAYS,
        "ends": fact.valid_to.timestamp() if fact.valid_to else _ALWAYS,
    }
    return models.PointStruct(id=point_id(name), vector=vector, payload=payload)


def fact_of(payload: dict[str, Any]) -> Fact:
    values = {field: payload[field] for field in Fact.__slots__}
    for field in _MOMENTS:
        values[field] = None if values[field] is None else datetime.fromisoformat(values[field])
    return Fact(**values | {"aliases": tuple(values["aliases"])})


def conditions(where: Filter, at: datetime | None = None) -> models.Filter:
    must: list[models.Condition] = [any_of(name, values) for name, values in where.fields() if values is not None]
    for key, value in where.metadata.items():
        if not re.fullmatch(r"\w+", key):
            raise InvalidFilter(f"metadata key {key!r}: Qdrant filters by keys of letters, digits and _", "metadata")
        if isinstance(value, bool | str):
            must.append(models.FieldCondition(key=f"metadata.{key}", match=models.MatchValue(value=value)))
        else:
            must.append(models.FieldCondition(key=f"metadata.{key}", range=models.Range(gte=value, lte=value)))
    if at is not None:
        must.append(models.FieldCondition(key="begins", range=models.Range(lte=at.timestamp())))
        must.append(models.FieldCondition(key="ends", range=models.Range(gt=at.timestamp())))
    return models.Filter(must=must)


def any_of(field: str, values: Sequence[Any]) -> models.FieldCondition:
    if isinstance(values[0], bool):
        return models.FieldCondition(key=field, match=models.MatchValue(value=values[0]))
    return models.FieldCondition(key=field, match=models.MatchAny(any=list(values)))
