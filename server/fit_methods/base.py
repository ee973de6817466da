"""What every method that fits has to say: its data, what to capture of it, and the artifact that it makes of that."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StringConstraints, field_validator

from server.engine.edits import Point, layers_at
from server.tuning.task import Tune
from steering_store import Store
from steering_store.manifest import Activation, Kind, Language, Role
from steering_store.tuning import Tuning

Array = npt.NDArray[np.float32]
Tensor = npt.NDArray[Any]
Text = Annotated[str, StringConstraints(min_length=1, max_length=1_000_000)]
Layer = Annotated[int, Field(ge=0)]
Keep = Literal["last", "mean", "rows"]
Progress = Callable[[int, int], None]
"""Takes (done, total)."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class FitError(ValueError):
    """Data or options that nothing can be fitted from; `field` is the one to correct."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class Data(Part):
    """Where the data comes from, for the artifact's provenance."""

    name: Annotated[str, StringConstraints(min_length=1)] = "uploaded data"
    license: str | None = None


class Options(Part):
    """What all methods' options have. `default_layers` and `default_strength` are the artifact's."""

    default_layers: Annotated[list[Layer], Field(min_length=1)] | None = None
    default_strength: FiniteFloat = 1.0

    @field_validator("default_layers")
    @classmethod
    def _each_once(cls, layers: list[int] | None) -> list[int] | None:
        if layers is not None and len(set(layers)) < len(layers):
            raise ValueError("a layer is named twice")
        return layers


@dataclass(frozen=True)
class ModelShape:
    """Of the served model: layers, attention heads, and the width of an activation at each point that is installed."""

    layers: int
    heads: int
    widths: Mapping[Point, int]


class DataText(NamedTuple):
    """One text to run through the model, and the field of the request that it is of."""

    field: str
    text: str


@dataclass(frozen=True)
class Wanted:
    """What to capture of every text, at the layers (None: all) of the points: the activation at its `last` token, the
    `mean` over its tokens but the first (an attention sink whose norm is far from all others), or the `rows` of all its
    tokens.
    """

    points: tuple[Point, ...]
    keep: Keep
    layers: tuple[int, ...] | None = None

    def at(self, point: Point, layers: int) -> tuple[int, ...]:
        """The layers at which to capture a point of a model with so many."""
        return self.layers or layers_at(point, layers)


class Capture(NamedTuple):
    """Texts to run, and what to capture of each."""

    texts: tuple[DataText, ...]
    wanted: Wanted


@dataclass(frozen=True)
class Activations:
    """What was captured, by point; texts are in the order of the `Capture`, layers those that it wanted.

    `pooled`: float32 [texts, layers, width], for `last` and `mean`. `rows`: one array [layers, tokens, width] a text.
    `norms`: the activations' mean L2 norm [layers]. `token_ids`: those of each text.
    """

    pooled: Mapping[Point, Array]
    rows: Mapping[Point, Sequence[Array]]
    norms: Mapping[Point, Array]
    token_ids: Sequence[Sequence[int]] = ()


@dataclass(frozen=True)
class Fitted:
    """The artifact in the making: its tensors by layer and role (None for a vector or for indices), all at one point.

    `config` is everything that decided the fit, as JSON can hold it; `parents` are digests of artifacts read for it.
    `labels` are JSON lines about an SAE's features, `default_features` what a request without features does to them.
    """

    kind: Kind
    point: Point
    tensors: Mapping[tuple[int, Role | None], Tensor]
    default_strength: float
    default_layers: Sequence[int]
    config: Mapping[str, Any]
    metrics: Mapping[str, float]
    strength_range: tuple[float, float] | None = None
    activation: Activation | None = None
    languages: Sequence[str] = ()
    seed: int | None = None
    parents: Sequence[str] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: bytes | None = None
    default_features: list[dict[str, Any]] | Literal["all"] | None = None
    tuning: Tuning | None = None


@dataclass(frozen=True)
class Context:
    """What a fit may use beside activations.

    `progress` is for fits that take minutes; an exception of it ends the fit. `work` is a folder of the fit's own: what
    it keeps there, it finds when it runs again after an interruption. `decode` makes text of token ids. `expert` finds
    the folder or hub id of another model that this server may load, and raises FitError for one that it may not.
    `weights` is the digest of the served model's weights, None where it is unknown; `model_path` the folder or hub id
    that they were loaded from.
    """

    model: ModelShape
    progress: Progress
    store: Store
    work: Path
    decode: Callable[[Sequence[int]], str]
    expert: Callable[[str], str]
    weights: str | None
    model_path: str


Steps = Generator[Capture, Activations, Fitted]
"""Yields what it wants captured, is sent that, and returns what it fitted."""


class MethodSpec(Part, ABC):
    """What to fit, from what, and the name to publish it under. The base of every method's own request."""

    data_field: ClassVar[str] = "pairs"
    """The field that holds the data."""

    method: str
    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    options: Options
    data: Data = Data()
    description: str = ""
    license: str | None = None
    languages: list[Language] = []
    tune: Tune | None = None
    """Choose strength, layers and options by a task."""

    @property
    def items(self) -> Sequence[BaseModel]:
        """The data: what its field holds."""
        items: Sequence[BaseModel] = getattr(self, self.data_field)
        return items

    def data_digest(self) -> str:
        """SHA-256 (hex) of the data in canonical form: the values of each item, in the order of its fields."""
        rows = [list(item.model_dump().values()) for item in self.items]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False, separators=(",", ":")).encode()).hexdigest()

    @abstractmethod
    def captures(self) -> list[Capture]:
        """Everything that the fit may want captured, so that it can be checked before."""

    @abstractmethod
    def steps(self, context: Context) -> Steps:
        """Fit. FitError, or a ValueError of the method's own, where that can't be done.

        Runs in a thread, away from the event loop. Run again with the same captures, it fits the same.
        """


class OnePassSpec(MethodSpec):
    """The base of methods that are fitted from one capture of all texts."""

    @abstractmethod
    def texts(self) -> list[DataText]:
        """All texts to run, in an order that `fit` knows."""

    @abstractmethod
    def wanted(self) -> Wanted:
        """What to capture of each of them."""

    @abstractmethod
    def fit(self, activations: Activations, model: ModelShape, progress: Progress) -> Fitted:
        """Fit. FitError, or a ValueError of the method's own, where that can't be done.

        Runs in a thread, away from the event loop. `progress` is for fits that take minutes.
        """

    def captures(self) -> list[Capture]:
        return [Capture(tuple(self.texts()), self.wanted())]

    def steps(self, context: Context) -> Steps:
        activations = yield self.captures()[0]
        return self.fit(activations, context.model, context.progress)
