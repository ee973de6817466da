"""ExpertSteer from its spec to a published vector, with an expert whose states are made up."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from methods import expertsteer
from server import experts
from server.api.errors import ApiError
from server.engine.capture import CaptureSpec, pooling_span
from server.fit_methods.base import FitError
from server.fit_methods.registry import parse_spec
from server.fits import run_fit
from steering_store import ArtifactVersion, Store
from tests.server.test_fit_jobs import HIDDEN, LAYERS, FakeEngine, identity

EXPERT_LAYERS, EXPERT_WIDTH, TEXTS = 3, 6, 40
ROWS = [
    {"text": f"{'good' if number % 2 else 'plain'} text {number}", "label": "positive" if number % 2 else "negative"}
    for number in range(TEXTS)
]


def expert_states(texts: Sequence[str]) -> np.ndarray:
    """Good texts lie apart along the second coordinate."""
    states = np.stack(
        [np.random.default_rng(list(text.encode())).standard_normal((EXPERT_LAYERS, EXPERT_WIDTH)) for text in texts]
    ).astype(np.float32)
    states[[text.startswith("good") for text in texts], :, 1] += 5
    return states


async def target_states(texts: Sequence[str]) -> np.ndarray:
    """[texts, layers, width], as the engine captures them."""
    sites = tuple(("resid_post", layer) for layer in range(LAYERS))
    spec: Any = CaptureSpec(sites, pooling_span("last"))  # type: ignore[arg-type]
    runs = [await FakeEngine().run_capture(list(text.encode()), spec, detokenize=False) for text in texts]
    return np.stack([[run.tensors[f"resid_post.{layer}"].numpy() for layer in range(LAYERS)] for run in runs])


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that were loaded."""
    paths: list[str] = []

    def last_states(path: str, texts: Sequence[str], progress: Callable[[int, int], None]) -> np.ndarray:
        paths.append(path)
        return expert_states(texts)

    monkeypatch.setattr(experts, "last_states", last_states)
    return paths


def find(name: str) -> str:
    if name != "big":
        raise FitError("options.expert", f"not {name}")
    return "/models/big"


def fit(folder: Path, rows: list[dict[str, str]] = ROWS, **options: Any) -> ArtifactVersion:
    spec = parse_spec({"method": "expertsteer", "name": "made", "texts": rows, "options": options})
    spec = parse_spec(spec.model_dump(mode="json"))
    arguments: Any = (spec, FakeEngine(), Store(folder / "store"), identity(), datetime(2026, 1, 2, tzinfo=UTC))
    return asyncio.run(run_fit(*arguments, lambda done, total: None, work=folder / "work", expert=find)).version


def vectors(folder: Path, version: ArtifactVersion) -> dict[int, np.ndarray]:
    tensors = Store(folder / "store").load_tensors(version)
    return {site.layer: tensors[site.tensor] for site in version.manifest.sites}


def test_the_vectors_are_the_methods_for_the_states_of_both_models(tmp_path: Path, loaded: list[str]) -> None:
    version = fit(tmp_path, expert="big", pairs=2)
    assert loaded == ["/models/big"]
    manifest = version.manifest
    texts = [row["text"] for row in ROWS]
    good = np.array([row["label"] == "positive" for row in ROWS])
    states, target = expert_states(texts), asyncio.run(target_states(texts))
    expected = expertsteer.fit(states[good], states[~good], target[good], expertsteer.Config(pairs=2))
    assert manifest.kind == "steering_vector" and manifest.provenance.method == "expertsteer"
    found = vectors(tmp_path, version)
    pairs: Any = manifest.provenance.config["layer_pairs"]
    assert len(pairs) == 2 and sorted({pair[1] for pair in pairs}) == sorted(found) == manifest.default_layers
    for layer, vector in expected.vectors.items():
        np.testing.assert_allclose(found[layer], vector, rtol=1e-5)
    assert manifest.metrics["correlation"] > 0.8


def test_controls_are_as_long_at_the_same_layers(tmp_path: Path, loaded: list[str]) -> None:
    own = vectors(tmp_path, fit(tmp_path, expert="big", pairs=2))
    for control in ("random", "least_squares"):
        other = vectors(tmp_path, fit(tmp_path, expert="big", pairs=2, control=control))
        assert other.keys() == own.keys()
        if control == "random":
            for layer, vector in own.items():
                assert np.linalg.norm(other[layer]) == pytest.approx(np.linalg.norm(vector), rel=1e-5)
        assert any(abs(float(own[k] @ other[k])) < 0.999 * float(np.linalg.norm(own[k]) ** 2) for k in own)


def test_what_an_earlier_attempt_got_of_the_expert_is_not_computed_again(tmp_path: Path, loaded: list[str]) -> None:
    same = [row | {"label": "positive" if number < 20 else "negative"} for number, row in enumerate(ROWS)]
    with pytest.raises(ApiError):  # layers that no pair ends at, which is found out behind the expert's run
        fit(tmp_path, same, expert="big", pairs=1, default_layers=[0, 1])
    assert len(list((tmp_path / "work").glob("expert-*.npy"))) == 1
    with pytest.raises(ApiError):
        fit(tmp_path, same, expert="big", pairs=1, default_layers=[0, 1])
    assert len(loaded) == 1


def test_the_target_as_its_own_expert_needs_none(tmp_path: Path, loaded: list[str]) -> None:
    class Apart(FakeEngine):
        async def run_capture(self, ids: Any, spec: Any, *, detokenize: bool) -> Any:
            run = await super().run_capture(ids, spec, detokenize=detokenize)
            for tensor in run.tensors.values():
                row = tensor.numpy()
                if row.ndim:
                    row += np.float32(4 * (ids[0] == ord("g")))
            return run

    spec = parse_spec(
        {"method": "expertsteer", "name": "own", "texts": ROWS, "options": {"control": "self_expert", "pairs": 1}}
    )
    arguments: Any = (spec, Apart(), Store(tmp_path / "store"), identity(), datetime(2026, 1, 2, tzinfo=UTC))
    version = asyncio.run(run_fit(*arguments, lambda done, total: None)).version
    (vector,) = vectors(tmp_path, version).values()
    assert loaded == [] and np.linalg.norm(vector) == pytest.approx(1, rel=1e-5)
    assert float(vector.sum() / np.sqrt(HIDDEN)) > 0.9


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "name an expert"),
        ({"expert": "big", "control": "self_expert"}, "name an expert"),
        ({"expert": ""}, "at least 1"),
    ],
)
def test_an_expert_is_named_unless_the_target_is_its_own(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        parse_spec({"method": "expertsteer", "name": "x", "texts": ROWS, "options": options})


@pytest.mark.parametrize(
    ("rows", "options", "field", "word"),
    [
        (ROWS, {"expert": "other"}, "options.expert", "not other"),
        (ROWS, {"expert": "big", "pairs": 7}, "texts", "pairs 7"),
        (ROWS[1::2], {"expert": "big"}, "texts", "at least 2"),
        (
            [{**row, "label": "positive" if i % 4 < 2 else "negative"} for i, row in enumerate(ROWS)],
            {"expert": "big"},
            "texts",
            "sign",
        ),
    ],
)
def test_what_nothing_can_be_fitted_from_names_its_field(
    tmp_path: Path, loaded: list[str], rows: list[dict[str, str]], options: Any, field: str, word: str
) -> None:
    with pytest.raises(ApiError, match=word) as refused:
        fit(tmp_path, rows, **options)
    assert refused.value.param == field
