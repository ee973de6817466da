"""Sweeps strength x layers x options of a fit over a task, and makes the best fluent point the artifact's default."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import ValidationError

from server.api.errors import ApiError
from server.api.served import ServedModel
from server.fit_methods.base import Fitted, MethodSpec, Progress
from server.tuning.candidates import Candidate
from server.tuning.measure import Task
from server.tuning.record import Record
from server.tuning.task import Tune, digest_of
from steering_store import Store
from steering_store.tuning import Scores, Tuning, TuningPoint

if TYPE_CHECKING:
    from server.engine.client import Engine

MAX_STRENGTH = 1e6
LEAST_DISTINCT = 0.5
"""Of the share of different pairs of tokens without steering; below it the text has begun to loop."""

Fit = Callable[[MethodSpec], Awaitable[Fitted]]
Describe = Callable[[Fitted], Mapping[str, object]]


@dataclass(frozen=True)
class Sweep:
    """A tuning on one engine. `fit` fits the spec with other options, `manifest` describes what came out."""

    spec: MethodSpec
    tune: Tune
    engine: Engine
    store: Store
    model: ServedModel
    fit: Fit
    manifest: Describe
    names: Callable[[Fitted], Mapping[str, np.ndarray]]

    async def run(self, record: Record, progress: Progress) -> Fitted:
        """The best fit with its defaults and the curve. ApiError where no point can be chosen, or a field is wrong."""
        task = Task.of(self.engine, self.tune)
        variants = [(each.options, await self._fitted(each.options)) for each in self.tune.variants()]
        places = [
            (number, layers, strength)
            for number, (_, fitted) in enumerate(variants)
            for layers in self.tune.layers or [sorted(fitted.default_layers)]
            for strength in self.tune.strengths
        ]
        candidates = [
            Candidate(self.spec.name, self.manifest(fitted), self.names(fitted), self.store) for _, fitted in variants
        ]
        # Before anything is measured: a layer that one variant lacks shall not be found out hours later.
        programs = [
            candidates[number].prepare(self.tune, strength, layers, self.model, self.engine.max_edits, MAX_STRENGTH)
            for number, layers, strength in places
        ]
        progress(0, len(places) + 1)
        baseline = await self._measured(task, record, {}, [], 0.0, None)
        progress(1, len(places) + 1)
        points = []
        for done, ((number, layers, strength), prepared) in enumerate(zip(places, programs, strict=True), 2):
            options = variants[number][0]
            scores = await self._measured(task, record, options, layers, strength, prepared)
            fluent = is_fluent(scores, baseline, self.tune.max_perplexity_ratio)
            place = {"strength": strength, "layers": layers, "options": options, "fluent": fluent}
            points.append(TuningPoint(**place, **scores.model_dump()))
            progress(done, len(places) + 1)
        chosen = best(points)
        if chosen is None:
            raise ApiError(
                422,
                f"every point makes text that is more than {self.tune.max_perplexity_ratio:g} times as perplexing as "
                "without steering, or loops; name smaller strengths",
                "tune.strengths",
            )
        fitted = variants[places[chosen][0]][1]
        return with_defaults(fitted, self._tuning(baseline, points, chosen))

    async def _fitted(self, options: dict[str, Any]) -> Fitted:
        try:
            fields = self.spec.model_dump(mode="json")
            fields["options"] |= options
            spec = type(self.spec).model_validate(fields)
            return await self.fit(spec)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = f"tune.{'.'.join(map(str, first['loc']))}"
            raise ApiError(422, f"{where}: {first['msg']}", where) from error

    async def _measured(
        self, task: Task, record: Record, options: dict[str, Any], layers: Sequence[int], strength: float, prepared: Any
    ) -> Scores:
        known = record.get(options, layers, strength)
        if known is not None:
            return known
        scores = await task.measure(prepared)
        record.add(options, layers, strength, scores)
        return scores

    def _tuning(self, baseline: Scores, points: Sequence[TuningPoint], chosen: int) -> Tuning:
        tune = self.tune
        objective = {"choices": tune.objective, "target": "log_prob", "label": "label_rate"}[tune.form]
        return Tuning(
            data=tune.data.name,
            license=tune.data.license,
            sha256=tune.digest,
            rows=len(tune.items),
            form=tune.form,
            split=sorted({item.split for item in tune.items}),
            test_sha256=digest_of(tune.test) if tune.test else None,
            objective=objective,  # type: ignore[arg-type]
            mode=tune.mode,
            intervention=tune.intervention,
            max_perplexity_ratio=tune.max_perplexity_ratio,
            baseline=baseline,
            points=list(points),
            chosen=chosen,
        )


def is_fluent(scores: Scores, baseline: Scores, ratio: float) -> bool:
    """Whether the text at a point is at most `ratio` times as perplexing as without steering, and doesn't loop."""
    if scores.perplexity is None or scores.distinct_2 is None:
        return False
    if baseline.perplexity is None or baseline.distinct_2 is None:
        return True
    return (
        scores.perplexity <= ratio * baseline.perplexity and scores.distinct_2 >= LEAST_DISTINCT * baseline.distinct_2
    )


def best(points: Sequence[TuningPoint]) -> int | None:
    """The fluent point with the largest effect, of several the most certain, then the gentlest; None without one."""
    fluent = [number for number, point in enumerate(points) if point.fluent]
    return max(
        fluent,
        key=lambda number: (points[number].effect, points[number].margin or 0.0, -abs(points[number].strength)),
        default=None,
    )


def with_defaults(fitted: Fitted, tuning: Tuning) -> Fitted:
    """The fit with the chosen point as its defaults, the curve, and what tuning was worth."""
    point = tuning.best
    alike = [
        each.strength
        for each in tuning.points
        if each.fluent and (each.layers, each.options) == (point.layers, point.options)
    ]
    metrics = {
        "tuned_effect": point.effect,
        "untuned_effect": tuning.baseline.effect,
        "tuned_gain": point.effect - tuning.baseline.effect,
    }
    config = dict(fitted.config)
    config |= {key: value for key, value in _defaults(point).items() if key in config}
    return replace(
        fitted,
        default_strength=point.strength,
        default_layers=point.layers,
        strength_range=(min(alike), max(alike)),
        metrics={**fitted.metrics, **metrics},
        config=config,
        tuning=tuning,
    )


def _defaults(point: TuningPoint) -> dict[str, Any]:
    return {"default_strength": point.strength, "default_layers": point.layers}
