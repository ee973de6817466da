"""INCLINE, from aligned translations: methods/incline.py."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from methods import incline
from server.engine.edits import layers_at
from server.fit_methods.base import (
    Activations,
    DataText,
    FitError,
    Fitted,
    ModelShape,
    OnePassSpec,
    Options,
    Part,
    Progress,
    Tensor,
    Text,
    Wanted,
)
from steering_store.manifest import Language, Role


class Translation(Part):
    """One sentence in the language to help, and in the one that the model knows best."""

    source: Text
    target: Text


class InclineOptions(Options):
    source_language: Language
    target_language: Language = "en"
    component: incline.Component = "hidden"
    pooling: incline.Pooling = "last"
    solver: incline.Solver = "ridge"
    ridge: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    prior: incline.Prior | None = None
    rank: PositiveInt | None = None
    mix: incline.Mix = "none"
    default_strength: Annotated[float, Field(allow_inf_nan=False)] = 0.1

    @model_validator(mode="after")
    def _no_ridge_without_a_penalty(self) -> InclineOptions:
        if self.solver == "min_norm" and (self.ridge is not None or self.prior is not None):
            raise ValueError("solver min_norm has neither ridge nor prior: leave them out")
        if self.rank is not None and self.prior == "identity":
            raise ValueError("prior identity has no smaller rank: leave one of them out")
        return self


class InclineSpec(OnePassSpec):
    method: Literal["incline"] = "incline"
    pairs: Annotated[list[Translation], Field(min_length=3)]
    options: InclineOptions

    def texts(self) -> list[DataText]:
        """The source and the target of every pair in turn."""
        texts = []
        for index, pair in enumerate(self.pairs):
            sides = incline.mixed(pair.source, pair.target, index, self.options.mix)
            texts += [
                DataText(f"pairs.{index}.{name}", text) for name, text in zip(("source", "target"), sides, strict=True)
            ]
        return texts

    def wanted(self) -> Wanted:
        return Wanted((incline.POINTS[self.options.component],), self.options.pooling)

    def fit(self, activations: Activations, model: ModelShape, progress: Progress) -> Fitted:
        options = self.options
        layers = options.default_layers or list(layers_at(incline.POINTS[options.component], model.layers))
        config = incline.Config(**options.model_dump(exclude={"default_layers"}), default_layers=tuple(layers))
        x = activations.pooled[config.point]
        if config.rank is not None and config.rank > (most := min(len(self.pairs), x.shape[2])):
            raise FitError("options.rank", f"rank {config.rank} is above {most}, which this data can give")
        maps = incline.fit(x[0::2], x[1::2], config)
        tensors: dict[tuple[int, Role | None], Tensor] = {}
        for layer, each in enumerate(maps):
            parts: dict[Role, Tensor | None] = {"matrix": each.matrix, "left": each.left, "right": each.right}
            parts["bias"] = each.bias
            tensors |= {(layer, role): part for role, part in parts.items() if part is not None}
        return Fitted(
            kind="linear_map",
            point=config.point,
            tensors=tensors,
            default_strength=config.default_strength,
            default_layers=layers,
            config=asdict(config) | _chosen(maps),
            metrics=_metrics(maps),
            languages=config.languages,
        )


def _chosen(maps: list[incline.Map]) -> dict[str, Any]:
    """What was chosen for each layer; JSON has no infinity, so that an infinite ridge is null."""
    return {
        "ridge_by_layer": [each.ridge if math.isfinite(each.ridge) else None for each in maps],
        "prior_by_layer": [each.prior for each in maps],
        "outliers_by_layer": [each.outliers for each in maps],
    }


def _metrics(maps: list[incline.Map]) -> dict[str, float]:
    """Means over the layers, the most outliers of any, and what each layer's map is worth: below 1 it beats the mean,
    below identity doing nothing.
    """
    metrics = {
        "heldout_error": float(np.mean([each.error for each in maps])),
        "identity_error": float(np.mean([each.identity_error for each in maps])),
        "rank_error": float(np.mean([each.rank_error for each in maps])),
        "outliers": float(max(each.outliers for each in maps)),
    }
    for layer, each in enumerate(maps):
        metrics |= {f"heldout_error.{layer}": each.error, f"identity_error.{layer}": each.identity_error}
    return metrics
