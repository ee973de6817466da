"""The `knowledge` field of a request as JSON, strict and without room for unknown keys; and its receipt."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from server.api.errors import ApiError

Name = Annotated[str, Field(min_length=1, max_length=64)]
Tag = Annotated[str, Field(max_length=35, pattern=r"^[A-Za-z]{2,8}(-[A-Za-z0-9]{1,8})*$")]
MAX_FACTS = 8
MAX_EXAMPLES = 64


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Examples(_Part):
    """Solved examples in front of the fact, those first that are most like it: from `collection`, in the language of
    the facts, and with `bilingual` translated into `language`, that of the question, too. Without `language` it is
    recognised.
    """

    collection: Name
    count: Annotated[int, Field(ge=1, le=MAX_EXAMPLES)] = 16
    form: Literal["bilingual", "monolingual"] = "bilingual"
    language: Tag | None = None


class Knowledge(_Part):
    """Answer from the facts of a collection where the question is about one of them.

    `remake` writes the paper's prompt; `context` puts the facts in front of the prompt as it is. `min_score` is the
    least probability that the question is about a fact; `edit_language` takes only facts in that language.
    """

    collection: Name
    mode: Literal["remake", "context"] = "remake"
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.5
    max_facts: Annotated[int, Field(ge=1, le=MAX_FACTS)] = 1
    examples: Examples | None = None
    edit_language: Tag | None = None


class UsedFact(BaseModel):
    """A fact of the prompt. `score` is the probability that the question is about it, `similarity` the cosine."""

    id: str
    version: int
    score: float
    similarity: float
    language: str | None


class Nearest(BaseModel):
    """The fact that the question came nearest to being about."""

    id: str
    version: int
    score: float
    similarity: float


class KnowledgeReceipt(BaseModel):
    """What was decided, by what, and which facts are in the prompt, best first. Out of scope it is as it was sent."""

    collection: str
    mode: Literal["remake", "context"]
    decision: Literal["in_scope", "out_of_scope"]
    min_score: float
    decider: str
    encoder: str
    language: str | None = None
    """That of the question, where it was named or needed."""
    facts: list[UsedFact]
    examples: int = 0
    nearest: Nearest | None = None
    """Out of scope, what was rejected."""


def parse(raw: object) -> Knowledge:
    """Read a `knowledge` field; ApiError 422 naming the first bad field."""
    try:
        return Knowledge.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(map(str, ("knowledge", *first["loc"])))
        remedy = "remove it" if first["type"] == "extra_forbidden" else "see docs/remake.md"
        raise ApiError(422, f"{param}: {first['msg']}; {remedy}", param) from None
