"""Facts: what is uploaded (`FactDraft`), and what the knowledge base keeps of it (`Fact`)."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    field_validator,
    model_validator,
)

from kb.errors import InvalidFact

CONTENT = ("text", "question", "answer", "language", "subject", "relation", "object")
"""The fields that say what a fact is; the others say where it comes from, when it holds, and what else is known."""


def _storable(value: str) -> str:
    if "\0" in value:
        raise ValueError("a NUL character can't be stored")
    return value


def aware(value: datetime) -> datetime:
    """In UTC, which a time without a zone is taken to be in."""
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _storable_metadata(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    # PostgreSQL takes neither in jsonb, and SQLite no lone surrogate.
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    text.encode()
    if "\\u0000" in text:
        raise ValueError("a NUL character can't be stored")
    return value


Text = Annotated[str, Field(min_length=1), AfterValidator(_storable)]
FactId = Annotated[str, Field(max_length=128, pattern=r"^\w[\w.:@+=,-]*$")]
Language = Annotated[str, Field(max_length=35, pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$")]
Moment = Annotated[datetime, AfterValidator(aware)]
Metadata = Annotated[dict[str, JsonValue], AfterValidator(_storable_metadata)]


class FactDraft(BaseModel):
    """A fact as a client sends it: a text, or a question with its answer, or all three.

    Without an `id`, a fact with the same content is the same fact. The interval of validity is half-open; a time
    without a zone is UTC. `embedding` is the document vector of the fact's key, made by the collection's encoder.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: FactId | None = None
    text: Text | None = None
    question: Text | None = None
    answer: Text | None = None
    language: Language | None = None
    subject: Text | None = None
    relation: Text | None = None
    object: Text | None = None
    aliases: tuple[Text, ...] = ()
    source: Text | None = None
    valid_from: Moment | None = None
    valid_to: Moment | None = None
    metadata: Metadata = Field(default_factory=dict)
    embedding: list[float] | None = Field(default=None, repr=False)

    @field_validator("language")
    @classmethod
    def _lower(cls, value: str | None) -> str | None:
        return value.lower() if value else value

    @model_validator(mode="after")
    def _whole(self) -> FactDraft:
        if self.text is None and (self.question is None or self.answer is None):
            raise ValueError("a fact needs 'text', or 'question' and 'answer'")
        if self.valid_from and self.valid_to and self.valid_from >= self.valid_to:
            raise ValueError("'valid_from' must be before 'valid_to'")
        return self

    @property
    def key(self) -> str:
        """What is embedded: the question if there is one, as in ReMaKE (section 3), else the text."""
        return self.question or self.whole_text

    @property
    def whole_text(self) -> str:
        return self.text if self.text is not None else f"{self.question} {self.answer}"

    def columns(self) -> dict[str, Any]:
        """The fields that a `Fact` shares with its draft."""
        names = set(FactDraft.model_fields) - {"id", "embedding", "text"}
        return {"text": self.whole_text, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True, slots=True)
class Fact:
    """One version of a fact.

    `seq` is the number of the write in its collection, and grows with every change. A fact is `deleted` by a call, or
    because the fact `superseded_by` took its place.
    """

    id: str
    text: str
    content_hash: str
    version: int
    seq: int
    created_at: datetime
    updated_at: datetime
    question: str | None = None
    answer: str | None = None
    language: str | None = None
    subject: str | None = None
    relation: str | None = None
    object: str | None = None
    aliases: tuple[str, ...] = ()
    source: str | None = None
    valid_from: datetime | None = None
    valid_to: datetime | None = None
    metadata: dict[str, JsonValue] = field(default_factory=dict)
    deleted: bool = False
    superseded_by: str | None = None

    @property
    def key(self) -> str:
        """What is embedded: the question if there is one, as in ReMaKE (section 3), else the text."""
        return self.question or self.text

    def valid_at(self, moment: datetime) -> bool:
        return (self.valid_from is None or self.valid_from <= moment) and (
            self.valid_to is None or moment < self.valid_to
        )


class Hit(NamedTuple):
    """A fact that was found, with the cosine of its vector and the query's."""

    fact: Fact
    score: float


def content_hash(draft: FactDraft) -> str:
    """`sha256:HEX` of what the fact says, without source, validity, aliases and metadata."""
    columns = draft.columns()
    text = json.dumps([columns[name] for name in CONTENT], ensure_ascii=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def key_hash(key: str) -> bytes:
    """What vectors of equal texts are found by."""
    return hashlib.sha256(key.encode()).digest()


def parse_draft(raw: bytes) -> FactDraft:
    """A draft from a line of JSON. Raises InvalidFact, which names the field."""
    try:
        return FactDraft.model_validate_json(raw)
    except ValidationError as exc:
        raise invalid_fact(exc) from None


def invalid_fact(exc: ValidationError) -> InvalidFact:
    """The first thing that is wrong, and the remedy."""
    error = exc.errors(include_url=False, include_input=False)[0]
    if error["type"] == "json_invalid":
        return InvalidFact(f"not a JSON object in UTF-8 ({error['ctx']['error']}); correct it and send it again")
    param = ".".join(str(part) for part in error["loc"]) or None
    remedy = "remove it" if error["type"] == "extra_forbidden" else "correct it and send the fact again"
    field_named = f"field {param!r}: " if param else ""
    return InvalidFact(f"{field_named}{error['msg']}; {remedy}", param)
