"""Which facts are meant: by their fields, alike in every backend."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from kb.facts import Fact, FactId

Scalar = str | int | float | bool


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


Words = Annotated[list[str], BeforeValidator(_listed), Field(min_length=1, max_length=1000)]


class Filter(BaseModel):
    """Facts of which every named field has one of the values given; `metadata` compares top-level keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ids: list[FactId] | None = Field(default=None, min_length=1, max_length=10_000)
    language: Words | None = None
    subject: Words | None = None
    relation: Words | None = None
    source: Words | None = None
    metadata: dict[str, Scalar] = Field(default_factory=dict, max_length=32)

    @property
    def empty(self) -> bool:
        return not self.metadata and all(value is None for _, value in self.fields())

    def fields(self) -> list[tuple[str, list[str] | None]]:
        """The names of columns, with the values of which one must be there."""
        languages = None if self.language is None else [each.lower() for each in self.language]
        return [
            ("id", self.ids),
            ("language", languages),
            ("subject", self.subject),
            ("relation", self.relation),
            ("source", self.source),
        ]

    @cached_property
    def _wanted(self) -> list[tuple[str, set[str]]]:
        return [(name, set(values)) for name, values in self.fields() if values is not None]

    def matches(self, fact: Fact) -> bool:
        return all(getattr(fact, name) in values for name, values in self._wanted) and all(
            key in fact.metadata and _same(fact.metadata[key], value) for key, value in self.metadata.items()
        )


def _same(left: object, right: Scalar) -> bool:
    # In Python True equals 1, in JSON it doesn't.
    return left == right and isinstance(left, bool) == isinstance(right, bool)
