"""How an artifact's default strength, layers and options were chosen: what was measured on validation data."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, JsonValue, NonNegativeInt, PositiveFloat, PositiveInt

Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0, le=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Scores(_Part):
    """What was measured at one point of a sweep.

    `effect` is what was maximised: accuracy or margin of choices, mean log-probability of targets, or the share of
    answers with the right label. `perplexity` is the median, under the unsteered model, of what the steered one
    continues prompts with greedily, and `distinct_2` the share of different pairs of neighbouring tokens in it; null
    where nothing was generated.
    """

    effect: FiniteFloat
    accuracy: Share | None = None
    margin: FiniteFloat | None = None
    perplexity: PositiveFloat | None = None
    distinct_2: Share | None = None


class TuningPoint(Scores):
    """`options` are those of the fit that were varied. `fluent` says whether the point could be chosen."""

    strength: FiniteFloat
    layers: list[NonNegativeInt]
    options: dict[str, JsonValue] = {}
    fluent: bool


class Tuning(_Part):
    """A sweep over strength, layers and options of the fit. `chosen` is the number of the point that was made default.

    `sha256` is that of the tuning data, `test_sha256` that of the test set that it was compared with, where one was
    named: they share no item. `intervention` are further fields of the intervention that was measured.
    """

    data: str
    sha256: Hex64
    rows: PositiveInt
    form: Literal["choices", "target", "label"]
    split: list[str]
    license: str | None = None
    test_sha256: Hex64 | None = None
    objective: Literal["accuracy", "margin", "log_prob", "label_rate"]
    mode: Literal["live", "frozen"] = "live"
    intervention: dict[str, JsonValue] = {}
    max_perplexity_ratio: PositiveFloat
    baseline: Scores
    points: Annotated[list[TuningPoint], Field(min_length=1, max_length=1000)]
    chosen: NonNegativeInt

    @property
    def best(self) -> TuningPoint:
        """The point that became the default."""
        return self.points[self.chosen]
