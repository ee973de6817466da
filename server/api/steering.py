"""The `steering` field of a request, and the receipt in its response.

A field is parsed, its artifacts are resolved and checked against the served model, and their method compiles them into
a program. Anything that can't be applied exactly as asked is an error with a reason.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.concurrency import run_in_threadpool

from methods import caa
from server.api.errors import ApiError
from server.engine.edits import Program, Span
from server.models import ModelIdentity
from steering_store import ArtifactVersion, Store
from steering_store.errors import StoreError

Index = Annotated[int, Field(ge=-(1 << 31), lt=1 << 31)]
Count = Annotated[int, Field(ge=0, lt=1 << 31)]


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


class Intervention(_Part):
    """One artifact, how strongly, where, on which tokens. Strength and layers default to the artifact's own."""

    artifact: Annotated[str, Field(min_length=1, max_length=256)]
    strength: float | None = None
    layers: Annotated[list[Count], Field(min_length=1, max_length=4096)] | None = None
    op: Literal["add", "add_norm"] = "add"
    apply: Apply = Apply()


class Steering(_Part):
    """The interventions of a request, applied in order; several at one site add up."""

    interventions: Annotated[list[Intervention], Field(min_length=1)]


class Applied(BaseModel):
    """One intervention as it was applied.

    `relative_dose` is the largest `|strength| * ||v|| / ||h||` over the layers, with the mean activation norm `||h||`
    of the data that the artifact was fitted on; null where the artifact doesn't say. `tokens_touched` was counted by
    the op, over all choices and prompts of the request; `tokens_from_cache` are tokens of the span that the prefix
    cache already held, edited in just this way by an earlier request.
    """

    artifact: str
    version: int
    digest: str
    kind: str
    op: str
    sites: list[str]
    strength: float
    relative_dose: float | None
    tokens_touched: int = 0
    tokens_from_cache: int = 0


class Receipt(BaseModel):
    """What steering did to a response."""

    fingerprint: str
    applied: list[Applied]


@dataclass(frozen=True)
class Prepared:
    """A program ready to run, and the artifacts whose vectors it needs on the device."""

    program: Program
    artifacts: dict[str, ArtifactVersion]
    applied: list[Applied]
    receipt: str = field(default_factory=lambda: uuid.uuid4().hex)


@dataclass
class Steerer:
    """Turns `steering` fields into programs for the served model, and counts into receipts."""

    store: Store
    identity: ModelIdentity
    layers: int
    hidden_size: int
    max_interventions: int
    max_strength: float
    model_match: Literal["weights", "shape"]
    _norms: dict[str, dict[int, float]] = field(default_factory=dict)

    def prepare(self, raw: object) -> Prepared:
        """Parse, resolve and compile. Raises ApiError or a StoreError that names the field."""
        steering = parse(raw)
        if len(steering.interventions) > self.max_interventions:
            raise ApiError(
                422,
                f"{len(steering.interventions)} interventions: a request takes at most {self.max_interventions}",
                "steering.interventions",
            )
        artifacts: dict[str, ArtifactVersion] = {}
        edits, applied = [], []
        for index, intervention in enumerate(steering.interventions):
            where = f"steering.interventions.{index}"
            version = self._resolve(intervention.artifact, f"{where}.artifact")
            self._check_model(version, f"{where}.artifact")
            layers = self._layers(intervention, version, where)
            strength = self._strength(intervention, version, where)
            edits += caa.compile(version.digest, layers, strength, intervention.op, intervention.apply.span())
            artifacts[version.digest] = version
            applied.append(
                Applied(
                    artifact=version.name,
                    version=version.version,
                    digest=version.digest,
                    kind=version.manifest.kind,
                    op=intervention.op,
                    sites=[f"resid_post.{layer}" for layer in layers],
                    strength=strength,
                    relative_dose=None,
                )
            )
        return Prepared(Program(tuple(edits)), artifacts, applied)

    def _resolve(self, reference: str, param: str) -> ArtifactVersion:
        try:
            return self.store.resolve(reference)
        except StoreError as error:
            error.param = param
            raise

    def _check_model(self, version: ArtifactVersion, param: str) -> None:
        made_for, served = version.manifest.model, self.identity
        facts = {
            "architecture": (made_for.architecture, served["architecture"]),
            "hidden size": (made_for.hidden_size, self.hidden_size),
            "number of layers": (made_for.num_layers, self.layers),
        }
        if self.model_match == "weights":
            facts["weights"] = (made_for.weights_digest, served["weights_digest"])
        for fact, (theirs, ours) in facts.items():
            if theirs is not None and ours is not None and theirs != ours:
                raise ApiError(
                    409,
                    f"{version.ref} was made for another model: its {fact} is {theirs}, the served model's is {ours}; "
                    "fit it on the served model, or serve its own",
                    param,
                )

    def _layers(self, intervention: Intervention, version: ArtifactVersion, where: str) -> list[int]:
        available = {site.layer for site in version.manifest.sites}
        chosen = intervention.layers or version.manifest.default_layers or sorted(available)
        if missing := sorted(set(chosen) - available):
            raise ApiError(
                422,
                f"{version.ref} has no vector for layers {missing}; it has layers {min(available)} to {max(available)}",
                f"{where}.layers",
            )
        return sorted(set(chosen))

    def _strength(self, intervention: Intervention, version: ArtifactVersion, where: str) -> float:
        strength = version.manifest.default_strength if intervention.strength is None else intervention.strength
        if not math.isfinite(strength) or abs(strength) > self.max_strength:
            raise ApiError(
                422,
                f"strength {strength} must be a finite number of at most {self.max_strength:g}",
                f"{where}.strength",
            )
        return strength

    async def vectors(self, version: ArtifactVersion) -> tuple[list[int], np.ndarray]:
        """The artifact's layers and its vectors [layers, hidden] float32, verified against their digests."""
        tensors = await run_in_threadpool(self.store.load_tensors, version)
        sites = sorted(version.manifest.sites, key=lambda site: site.layer)
        data = np.stack([tensors[site.tensor] for site in sites])
        norms = np.linalg.norm(data, axis=1).tolist()
        self._norms[version.digest] = {site.layer: norm for site, norm in zip(sites, norms, strict=True)}
        return [site.layer for site in sites], data

    def receipt(self, prepared: Prepared, touched: Sequence[Sequence[int]], cached: Sequence[int]) -> Receipt:
        """Fill in what the op counted: `touched` [edits][sites], `cached` [edits]."""
        for index, (edit, applied) in enumerate(zip(prepared.program.edits, prepared.applied, strict=True)):
            applied.tokens_touched = min(touched[index][layer] for layer in edit.layers)
            applied.tokens_from_cache = cached[index]
            applied.relative_dose = self._dose(
                prepared.artifacts[edit.operand], edit.opcode, edit.strength, edit.layers
            )
        return Receipt(fingerprint=prepared.program.fingerprint, applied=prepared.applied)

    def _dose(self, version: ArtifactVersion, op: str, strength: float, layers: Sequence[int]) -> float | None:
        if op == "add_norm":
            return abs(strength)
        h_norm, norms = version.manifest.h_norm, self._norms.get(version.digest, {})
        doses = [abs(strength) * norms[layer] / h_norm[layer] for layer in layers if layer in h_norm and layer in norms]
        return round(max(doses), 6) if len(doses) == len(layers) else None


def parse(raw: object) -> Steering:
    """Read a `steering` field; ApiError 422 naming the first bad field."""
    try:
        return Steering.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        param = ".".join(map(str, ("steering", *first["loc"])))
        remedy = "remove it" if first["type"] == "extra_forbidden" else "see GET /v1/capabilities and the documentation"
        raise ApiError(422, f"{param}: {first['msg']}; {remedy}", param) from None
