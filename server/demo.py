"""The demo artifacts: fitted once from the samples in demo_data, on whatever model is served."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import resources
from typing import TYPE_CHECKING

from fastapi.concurrency import run_in_threadpool

from server.fit_methods.base import Data, Progress
from server.fit_methods.caa import CaaOptions, CaaSpec
from server.fit_methods.pairs import Pair
from server.fits import run_fit
from server.models import ModelIdentity
from steering_store import Store
from steering_store.errors import ArtifactNotFound

if TYPE_CHECKING:
    from server.engine.client import Engine


def demo_specs(layers: int) -> list[CaaSpec]:
    """What to fit on a model of so many layers."""
    # Where and how strongly: measured on SmolLM2 (docs/sentiment.md, docs/french.md). In the second quarter of the
    # layers sentiment moves most before the text breaks; French comes only from earlier layers and a small strength.
    return [
        CaaSpec(
            name="sentiment",
            pairs=_pairs("sentiment.jsonl"),
            options=CaaOptions(pooling="mean", default_layers=_between(layers, 0.27, 0.53), default_strength=2.0),
            description="Positive against negative film reviews: a positive strength makes the text more positive.",
            data=Data(name="counterfactually augmented film reviews (Kaushik et al. 2020)", license="Apache-2.0"),
            license="Apache-2.0",
            languages=["en"],
        ),
        CaaSpec(
            name="french",
            pairs=_pairs("french.jsonl"),
            options=CaaOptions(pooling="mean", default_layers=_between(layers, 0.17, 0.33), default_strength=0.3),
            description="French against English: a positive strength makes the model write French.",
            data=Data(name="Universal Declaration of Human Rights", license="public domain"),
            license="Apache-2.0",
            languages=["en", "fr"],
        ),
    ]


def _between(layers: int, start: float, end: float) -> list[int]:
    """The layers from one share of the depth to another; at least one."""
    first = min(round(start * layers), layers - 1)
    return list(range(first, max(round(end * layers), first + 1)))


def _pairs(name: str) -> list[Pair]:
    text = resources.files("server").joinpath("demo_data", name).read_text("utf-8")
    return [Pair(**json.loads(line)) for line in text.splitlines()]


async def ensure_demo(
    engine: Engine, store: Store, identity: ModelIdentity, progress_of: Callable[[str], Progress]
) -> list[str]:
    """Fit the demo artifacts that this model lacks and return their names. After an interruption, the next one."""
    fitted = []
    for spec in demo_specs(engine.layers):
        if not await run_in_threadpool(_present, spec, store, identity):
            await run_fit(spec, engine, store, identity, datetime.now(UTC), progress_of(spec.name))
            fitted.append(spec.name)
    return fitted


def _present(spec: CaaSpec, store: Store, identity: ModelIdentity) -> bool:
    try:
        latest = store.resolve(spec.name).manifest
    except ArtifactNotFound:
        return False
    data = latest.provenance.data
    made_here = latest.model.weights_digest == identity["weights_digest"]
    same_data = data is not None and data.sha256 == spec.data_digest()
    options = spec.options
    defaults = (latest.default_layers, latest.default_strength)
    return made_here and same_data and defaults == (options.default_layers, options.default_strength)
