"""What a fit is tuned on: items of a validation split, the grid to sweep, and the data that it must not have seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import product
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    StringConstraints,
    field_validator,
    model_validator,
)

Form = Literal["choices", "target", "label"]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1_000_000)]
Hex64 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
MAX_POINTS = 500
SPLITS = ("validation", "dev")
FIELDS: dict[Form, tuple[str, ...]] = {
    "choices": ("choices", "answer"),
    "target": ("target",),
    "label": ("label", "scorer"),
}
"""What an item of each form has beside its prompt."""


class TuneError(ValueError):
    """A tuning that can't be done, or must not; `field` is the one to correct."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Item(_Part):
    """A prompt, and one of three things: `choices` and the number of the right `answer`; the `target` that should
    follow; or the `label` that a `scorer` should give to what the model answers.

    Choices and targets are appended to the prompt as they are, so that most begin with a space.
    """

    prompt: Text
    split: str
    choices: Annotated[list[Text], Field(min_length=2, max_length=100)] | None = None
    answer: int | None = None
    target: Text | None = None
    label: Text | None = None
    scorer: Literal["contains", "language"] | None = None

    @field_validator("split")
    @classmethod
    def _is_for_tuning(cls, split: str) -> str:
        if split not in SPLITS:
            raise ValueError(
                f"{split!r} isn't for tuning: only {' and '.join(SPLITS)} are; never tune on the test split"
            )
        return split

    @model_validator(mode="after")
    def _one_form(self) -> Item:
        given = [form for form, fields in FIELDS.items() if any(getattr(self, name) is not None for name in fields)]
        if len(given) != 1:
            raise ValueError("an item has either choices and answer, or target, or label and scorer")
        if missing := [name for name in FIELDS[given[0]] if getattr(self, name) is None]:
            raise ValueError(f"{missing[0]} is missing")
        if self.choices is not None and not 0 <= (self.answer or 0) < len(self.choices):
            raise ValueError(f"answer {self.answer} is none of the {len(self.choices)} choices, counted from 0")
        return self

    @property
    def form(self) -> Form:
        return next(form for form, fields in FIELDS.items() if getattr(self, fields[0]) is not None)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the item without its split: the same item under another split is the same."""
        content = self.model_dump(exclude={"split"}, exclude_none=True)
        return _sha256(content)

    @property
    def texts(self) -> list[str]:
        """The prompt, alone and with all that may follow it."""
        endings = self.choices or ([self.target] if self.target is not None else [])
        return [self.prompt, *(self.prompt + ending for ending in endings)]


class TuneData(_Part):
    """Where the items come from, for the manifest."""

    name: Annotated[str, StringConstraints(min_length=1)] = "uploaded data"
    license: str | None = None


class Variant(NamedTuple):
    """Options of the fit that differ from the spec's."""

    options: dict[str, Any]


class Tune(_Part):
    """What to sweep, and on what. Points are strengths x layers x options of the fit.

    `layers` are sets of layers, the fit's own where it is left out. `options` has lists of values by name of an option.
    `intervention` are further fields of an intervention, such as `op` or `apply`, the same at all points. `test` are
    digests (`Item.digest`) of the items of the test set: none of them may be tuned on. Greedy continuations of the
    first `fluency_prompts` prompts, `tokens` long, may be at most `max_perplexity_ratio` times as perplexing to the
    unsteered model as its own are.
    """

    items: Annotated[list[Item], Field(min_length=1, max_length=10_000)]
    strengths: Annotated[list[FiniteFloat], Field(min_length=1, max_length=100)]
    layers: Annotated[list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]], Field(min_length=1)] | (
        None
    ) = None
    options: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = {}
    intervention: dict[str, JsonValue] = {}
    mode: Literal["live", "frozen"] = "live"
    objective: Literal["accuracy", "margin"] = "accuracy"
    fluency_prompts: Annotated[int, Field(ge=1, le=1000)] = 16
    tokens: Annotated[int, Field(ge=2, le=1024)] = 32
    max_perplexity_ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    test: list[Hex64] = []
    data: TuneData = TuneData()

    @field_validator("strengths")
    @classmethod
    def _not_zero_and_once(cls, strengths: list[float]) -> list[float]:
        if 0 in strengths or len(set(strengths)) < len(strengths):
            raise ValueError("name each strength once; 0 is measured anyway, as the baseline")
        return strengths

    @field_validator("layers")
    @classmethod
    def _sets(cls, layers: list[list[int]] | None) -> list[list[int]] | None:
        if layers is None:
            return None
        ordered = [sorted(set(each)) for each in layers]
        if [len(each) for each in ordered] != [len(each) for each in layers] or len(
            {tuple(each) for each in ordered}
        ) < len(ordered):
            raise ValueError("name each set of layers once, and each layer once in it")
        return ordered

    @field_validator("intervention")
    @classmethod
    def _only_what_is_the_same_everywhere(cls, fields: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if swept := sorted({"artifact", "strength", "layers", "condition"} & fields.keys()):
            raise ValueError(f"{swept[0]} can't be here: leave it out")
        return fields

    @model_validator(mode="after")
    def _one_form_and_not_too_much(self) -> Tune:
        forms = {item.form for item in self.items}
        if len(forms) > 1:
            raise ValueError(f"all items have one form, and these have {', '.join(sorted(forms))}")
        if self.objective == "margin" and self.form != "choices":
            raise ValueError(f"objective margin is for choices, not for items with a {self.form}")
        points = len(self.strengths) * len(self.layers or [[]]) * len(self.variants())
        if points > MAX_POINTS:
            raise ValueError(f"{points} points: sweep at most {MAX_POINTS}")
        return self

    @property
    def form(self) -> Form:
        return self.items[0].form

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the items in their order, whatever split they are said to be of."""
        return digest_of([item.digest for item in self.items])

    def variants(self) -> list[Variant]:
        """Every combination of the options; one without any where none are swept."""
        return [Variant(dict(zip(self.options, values, strict=True))) for values in product(*self.options.values())]

    def check_unseen(self, fitted_on: Iterable[str]) -> None:
        """TuneError where an item is of the test set, or one of the texts that the artifact is fitted on."""
        test, seen = set(self.test), {_plain(text) for text in fitted_on}
        for number, item in enumerate(self.items):
            where = f"tune.items.{number}"
            if item.digest in test:
                raise TuneError(where, "this item is in the test set too; never tune on what you report on")
            if any(_plain(text) in seen for text in item.texts):
                raise TuneError(where, "the fit's own data has this text; tune on other data than it is fitted on")


def digest_of(digests: list[str]) -> str:
    """SHA-256 (hex) of a set of items, from their own."""
    return _sha256(digests)


def _plain(text: str) -> str:
    """Texts that differ in their spaces only are the same."""
    return "".join(text.split())


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()
