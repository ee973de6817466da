"""Contrastive activation addition, from pairs of texts: methods/caa.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

from pydantic import Field

from methods import caa
from server.fit_methods.base import (
    Activations,
    DataText,
    FitError,
    Fitted,
    MethodSpec,
    ModelShape,
    Options,
    Part,
    Progress,
    Text,
    Wanted,
)


class Pair(Part):
    """Two texts that differ in the property to steer: more of it, less of it."""

    positive: Text
    negative: Text


class CaaOptions(Options):
    variant: caa.Variant = "mean_difference"
    pooling: caa.Pooling = "last"


class CaaSpec(MethodSpec):
    method: Literal["caa"] = "caa"
    pairs: Annotated[list[Pair], Field(min_length=2)]
    options: CaaOptions = CaaOptions()

    def texts(self) -> list[DataText]:
        """The positive and the negative text of every pair in turn."""
        return [
            DataText(f"pairs.{index}.{side}", getattr(pair, side))
            for index, pair in enumerate(self.pairs)
            for side in ("positive", "negative")
        ]

    def wanted(self) -> Wanted:
        return Wanted(("resid_post",), self.options.pooling)

    def fit(self, activations: Activations, model: ModelShape, progress: Progress) -> Fitted:
        options = self.options
        config = caa.Config(
            variant=options.variant,
            pooling=options.pooling,
            default_layers=None if options.default_layers is None else tuple(options.default_layers),
            default_strength=options.default_strength,
        )
        x = activations.pooled["resid_post"]
        fitted = caa.fit(x[0::2], x[1::2], config)
        if zero := [layer for layer in fitted.default_layers if not fitted.vectors[layer].any()]:
            raise FitError(
                "pairs", f"the two sides of the pairs don't differ at layers {zero}: steering would do nothing"
            )
        best = int(fitted.agreement.argmax())
        return Fitted(
            kind="steering_vector",
            point="resid_post",
            tensors={(layer, None): vector for layer, vector in enumerate(fitted.vectors)},
            default_strength=config.default_strength,
            default_layers=fitted.default_layers,
            config=asdict(config),
            metrics={
                "agreement_best": float(fitted.agreement[best]),
                "agreement_best_layer": float(best),
                "agreement_default_layers": float(fitted.agreement[list(fitted.default_layers)].mean()),
            },
        )
