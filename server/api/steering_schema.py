"""The `steering` field of a request as JSON: its parts, each strict and without room for unknown keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from server.api.errors import ApiError
from server.engine.spans import Span
from steering_store.manifest import LANGUAGE_PATTERN

Index = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Reference = Annotated[str, Field(min_length=1, max_length=256)]

LAST_PROMPT_TOKEN = Span(prompt=False, generation=False, prompt_positions=(-1,))


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Apply(_Part):
    """Which tokens an intervention touches; without any of the including fields, all of prompt and generation.

    Windows are half-open `[start, end]` and `end` may be null. Prompt positions and windows count from the prompt's end
    when negative; generation windows count from the first generated token. Excludes always subtract.
    """

    prompt: Literal["all"] | None = None
    generation: Literal["all"] | None = None
    prompt_positions: Annotated[list[Index], Field(min_length=1, max_length=4096)] | None = None
    prompt_window: tuple[Index, Index | None] | None = None
    generation_window: tuple[Count, Count | None] | None = None
    exclude_prompt_positions: Annotated[list[Index], Field(min_length=1, max_length=4096)] | None = None
    exclude_prompt_window: tuple[Index, Index | None] | None = None
    exclude_generation_window: tuple[Count, Count | None] | None = None

    @model_validator(mode="before")
    @classmethod
    def _windows_as_tuples(cls, data: Any) -> Any:
        # JSON has no tuples, and strict mode takes no list for one.
        if not isinstance(data, dict):
            return data
        return {
            key: tuple(value) if key.endswith("window") and isinstance(value, list) else value
            for key, value in data.items()
        }

    @model_validator(mode="after")
    def _windows_hold_something(self) -> Apply:
        for name in ("prompt_window", "generation_window", "exclude_prompt_window", "exclude_generation_window"):
            window = getattr(self, name)
            if window is None or window[1] is None:
                continue
            start, end = window
            if (start < 0) == (end < 0) and end <= start:
                raise ValueError(
                    f"{name} [{start}, {end}] is empty: the end is exclusive and must lie behind the start"
                )
        return self

    def span(self) -> Span:
        including = (self.prompt, self.generation, self.prompt_positions, self.prompt_window, self.generation_window)
        everything = all(each is None for each in including)
        return Span(
            prompt=everything or self.prompt == "all",
            generation=everything or self.generation == "all",
            prompt_positions=tuple(sorted(set(self.prompt_positions or ()))),
            prompt_window=self.prompt_window,
            generation_window=self.generation_window,
            exclude_prompt_positions=tuple(sorted(set(self.exclude_prompt_positions or ()))),
            exclude_prompt_window=self.exclude_prompt_window,
            exclude_generation_window=self.exclude_generation_window,
        )


class Feature(_Part):
    """What becomes of one feature of an SAE: `add` value to it, `scale` it by 1 + value, `clamp` it to `value` or from
    `min` to `max`, or `ablate` it."""

    index: Count
    op: Literal["add", "scale", "clamp", "ablate"]
    value: Number | None = None
    min: Number | None = None
    max: Number | None = None


class Condition(_Part):
    """When the intervention acts: while the read-out of the activation along a steering_vector is above the threshold
    (or, with `above` false, below it).

    `token` decides for every token at every layer of the intervention by itself. `sequence` decides once, at the last
    prompt token of one layer, for the rest of the answer. That layer is named by `layer`, or by `site`
    (`resid_post.14`, `blocks.14.hook_resid_post`).
    """

    artifact: Reference
    threshold: Number
    layer: Count | None = None
    site: Annotated[str, Field(min_length=1, max_length=64)] | None = None
    readout: Literal["dot", "cosine"] = "cosine"
    above: bool = True
    scope: Literal["token", "sequence"] = "token"


class Intervention(_Part):
    """One artifact, what to do with it, how strongly, where, on which tokens and when.

    Layers default to the artifact's own, and so does the strength of `add`, `add_norm`, `scale`, `map` and features.
    """

    artifact: Reference
    strength: float | None = None
    layers: Annotated[list[Count], Field(min_length=1, max_length=4096)] | None = None
    op: Literal["add", "add_norm", "ablate", "clamp", "set", "scale", "map"] | None = None
    value: Number | None = None
    min: Number | None = None
    max: Number | None = None
    features: Annotated[list[Feature], Field(min_length=1, max_length=256)] | None = None
    apply: Apply = Apply()
    condition: Condition | None = None
    renorm: bool = False


class Steering(_Part):
    """The interventions of a request, applied in order.

    `conflict: "error"` refuses two that write the same direction of the same site. `mode: "frozen"` takes the
    activations of the last prompt token from a run without interventions, and edits these. `source_language` is the
    prompt's, a tag such as sw, for presets that act by language; without it they identify it.
    """

    interventions: Annotated[list[Intervention], Field(min_length=1)]
    conflict: Literal["sequential", "error"] = "sequential"
    mode: Literal["live", "frozen"] = "live"
    source_language: Annotated[str, Field(pattern=LANGUAGE_PATTERN, max_length=64)] | None = None
    max_relative_dose: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None


def parse(raw: object) -> Steering:
    """Read a `steering` field; ApiError 422 naming the first bad field."""
    try:
        return Steering.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(map(str, ("steering", *first["loc"])))
        remedy = "remove it" if first["type"] == "extra_forbidden" else "see GET /v1/capabilities and the documentation"
        raise ApiError(422, f"{param}: {first['msg']}; {remedy}", param) from None
