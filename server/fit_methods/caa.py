"""Contrastive activation addition, from pairs of texts: methods/caa.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from methods import caa
from server.fit_methods.base import Activations, FitError, Fitted, ModelShape, Progress
from server.fit_methods.pairs import PairOptions, PairsSpec


class CaaOptions(PairOptions):
    variant: caa.Variant = "mean_difference"


class CaaSpec(PairsSpec):
    method: Literal["caa"] = "caa"
    options: CaaOptions = CaaOptions()

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
