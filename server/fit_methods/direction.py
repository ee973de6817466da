"""A direction from pairs of texts by any extractor, for steering, ablation or conditions: methods/extractors.py."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field

from methods import caa, extractors
from server.fit_methods.base import Activations, FitError, Fitted, Layer, ModelShape, Progress
from server.fit_methods.pairs import Pair, PairOptions, PairsSpec


class DirectionOptions(PairOptions):
    """`everywhere`: the vector of this layer at all layers, for directional ablation."""

    extractor: extractors.Extractor = "mean_difference"
    penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    everywhere: Layer | None = None


class DirectionSpec(PairsSpec):
    method: Literal["direction"] = "direction"
    pairs: Annotated[list[Pair], Field(min_length=5)]
    options: DirectionOptions = DirectionOptions()

    def fit(self, activations: Activations, model: ModelShape, progress: Progress) -> Fitted:
        options = self.options
        if options.everywhere is not None and options.everywhere >= model.layers:
            raise FitError("options.everywhere", f"layer {options.everywhere} isn't below the model's {model.layers}")
        x = activations.pooled["resid_post"]
        config = extractors.Config(options.extractor, options.penalty)
        found = extractors.extract(x[0::2], x[1::2], config)
        layers = options.default_layers or _default_layers(options, model.layers)
        _check_steerable(found, options, layers)
        vectors = found.vectors
        condition = extractors.condition(x[0::2], x[1::2], vectors)
        if options.everywhere is not None:
            vectors = extractors.everywhere(vectors, options.everywhere)
        best = int(found.correlations.argmax())
        return Fitted(
            kind="steering_vector",
            point="resid_post",
            tensors={(layer, None): vector for layer, vector in enumerate(vectors) if vector.any()},
            default_strength=options.default_strength,
            default_layers=layers,
            config=asdict(config) | {"pooling": options.pooling, "everywhere": options.everywhere},
            metrics=_metrics(found, best) | _condition_metrics(condition),
        )


def _default_layers(options: DirectionOptions, layers: int) -> list[int]:
    return list(range(layers)) if options.everywhere is not None else list(caa.middle_third(layers))


def _check_steerable(found: extractors.Directions, options: DirectionOptions, layers: list[int]) -> None:
    """An even concept has a direction, but no sense to steer in."""
    read = [options.everywhere] if options.everywhere is not None else layers
    if weak := [layer for layer in read if found.correlations[layer] < extractors.STEERABLE]:
        raise FitError(
            "pairs",
            f"at layers {weak} the two sides lie alike along the direction that {options.extractor} found: steering "
            "there has no defined sense; choose other layers or another extractor",
        )


def _metrics(found: extractors.Directions, best: int) -> dict[str, float]:
    metrics = {"correlation_best": float(found.correlations[best]), "correlation_best_layer": float(best)}
    metrics |= {f"correlation.{layer}": float(each) for layer, each in enumerate(found.correlations)}
    # JSON has no nan: with too few pairs to hold some out there is no AUC.
    return metrics | {f"auc.{layer}": float(each) for layer, each in enumerate(found.aucs) if each == each}


def _condition_metrics(condition: extractors.Condition) -> dict[str, Any]:
    return {
        "condition_layer": float(condition.layer),
        "condition_threshold": condition.threshold,
        "condition_above": float(condition.above),
        "condition_f1": condition.f1,
        "condition_heldout_f1": condition.held_out_f1,
    }
