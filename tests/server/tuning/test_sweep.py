"""A fit that is tuned, on an engine whose answers follow from the program it is given."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from server.api.errors import ApiError
from server.engine.edits import OPCODES, Program
from server.fit_methods.registry import parse_spec
from server.fits import run_fit
from server.tuning.sweep import best, is_fluent
from steering_store import Store
from steering_store.errors import ArtifactNotFound
from steering_store.tuning import Scores, TuningPoint
from tests.server.test_fit_jobs import HIDDEN, FakeEngine, identity
from tests.server.test_fits import ANSWERED

RIGHT, WRONG = " yes", " no"
ITEMS = [{"prompt": f"Is {i} hot?", "choices": [WRONG, RIGHT], "answer": 1, "split": "dev"} for i in range(3)]
TUNE: dict[str, Any] = {"items": ITEMS, "strengths": [1.0, 2.0, 4.0, 8.0], "objective": "margin", "tokens": 8}


class Tokenizer:
    """Bytes."""

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode()) for text in texts]}

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode()


class TunedEngine(FakeEngine):
    """Steering helps in proportion to the strength, at layer 1 more than at layer 0, and breaks the text above 5."""

    max_edits, prefix_cache, vocab_size = 4, "tagged", 256

    def __init__(self) -> None:
        super().__init__()
        self.points = {point: {"width": HIDDEN, "opcodes": OPCODES, "reason": None} for point in self.points}
        self.scored = 0
        self.crash_after = 10**9

    tokenizer: Any = Tokenizer()

    async def ensure(self, program: Program, loaders: Any) -> None:
        for key in program.operands:
            assert (await loaders[key]()).width == HIDDEN

    async def log_probs(
        self, ids: Sequence[int], start: int, program: Program | None = None, prompt_length: int | None = None
    ) -> list[float]:
        await asyncio.sleep(0)
        self.scored += 1
        if self.scored > self.crash_after:
            raise RuntimeError("killed")
        tail = bytes(ids[start:]).decode()
        if tail == WRONG or tail == RIGHT:
            assert prompt_length == start
            return [self.gain(program) if tail == RIGHT else 0.0] + [-1.0] * (len(ids) - start - 1)
        if prompt_length is not None:
            return [-9.0] * (len(ids) - start)
        assert program is None
        return [-5.0 if tail[0] == "x" else -1.0] * (len(ids) - start)

    async def continuation(self, ids: Sequence[int], tokens: int, program: Program | None = None) -> list[int]:
        return list(b"xyzzyplu" if self.strength(program) > 5 else b"abcdefgh")[:tokens]

    @staticmethod
    def strength(program: Program | None) -> float:
        return program.edits[0].strength if program is not None else 0.0

    def gain(self, program: Program | None) -> float:
        layers = program.edits[0].layers if program is not None else ()
        return 0.5 + self.strength(program) * sum(1 + layer for layer in layers)


def spec(**tune: Any) -> Any:
    pairs = [{"positive": f"good {i}", "negative": f"bad {i}"} for i in range(4)]
    return parse_spec({"method": "caa", "name": "made", "pairs": pairs, "tune": TUNE | tune})


async def run(folder: Path, engine: Any, wanted: Any) -> Any:
    progress: list[tuple[int, int]] = []
    created = datetime(2026, 1, 2, tzinfo=UTC)
    arguments: Any = (wanted, engine, Store(folder / "store"), identity(), created)
    publication = await run_fit(*arguments, lambda done, total: progress.append((done, total)), work=folder / "work")
    assert progress[-1][0] == progress[-1][1]
    return publication.version.manifest


def test_the_best_fluent_point_becomes_the_default(tmp_path: Path) -> None:
    manifest = asyncio.run(run(tmp_path, TunedEngine(), spec(layers=[[0], [1], [0, 1]])))
    tuning = manifest.tuning
    assert len(tuning.points) == 12
    assert (manifest.default_strength, manifest.default_layers) == (4.0, [0, 1])
    assert tuning.best.margin == pytest.approx(0.5 + 4 * 3 - 0.0 + (-3.0) - (-2.0))
    assert tuning.baseline.margin == pytest.approx(0.5 - 3 + 2)
    assert [point.fluent for point in tuning.points[:4]] == [True, True, True, False]
    assert manifest.strength_range == (1.0, 4.0)
    assert manifest.metrics["tuned_gain"] == pytest.approx(12.0)
    assert (tuning.form, tuning.split, tuning.rows, tuning.objective) == ("choices", ["dev"], 3, "margin")
    assert not (tmp_path / "work").exists()


def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_curve(tmp_path: Path) -> None:
    whole = asyncio.run(run(tmp_path / "whole", TunedEngine(), spec()))
    engine = TunedEngine()
    engine.crash_after = 20
    with pytest.raises(RuntimeError, match="killed"):
        asyncio.run(run(tmp_path / "cut", engine, spec()))
    lines = (tmp_path / "cut" / "work" / "tuning.jsonl").read_text().splitlines()
    measured = len(lines) - 1
    assert 0 < measured < 5
    again = TunedEngine()
    manifest = asyncio.run(run(tmp_path / "cut", again, spec()))
    assert manifest.tuning == whole.tuning
    per_point = len(ITEMS) * 3  # two choices of each item, and its continuation
    assert again.scored == per_point * (5 - measured)


def test_options_of_the_fit_are_swept_and_the_best_variant_is_published(tmp_path: Path) -> None:
    tune = TUNE | {"options": {"top_k": [1, 2]}, "strengths": [1.0], "layers": None}
    wanted = parse_spec(
        {"method": "sadi", "name": "made", "pairs": ANSWERED, "options": {"component": "mlp"}, "tune": tune}
    )
    engine = TunedEngine()
    manifest = asyncio.run(run(tmp_path, engine, wanted))
    assert [point.options for point in manifest.tuning.points] == [{"top_k": 1}, {"top_k": 2}]
    assert manifest.provenance.config["top_k"] == manifest.tuning.best.options["top_k"]
    assert sum(site.shape[0] for site in manifest.sites) == manifest.tuning.best.options["top_k"]
    assert engine.captured == 2 * len(ANSWERED), "both variants are fitted from one capture"


@pytest.mark.parametrize(
    ("tune", "param"),
    [
        ({"layers": [[0], [2]]}, "tune.layers"),
        ({"strengths": [1e7]}, "tune.strengths"),
        ({"intervention": {"op": "scale"}}, "tune.intervention.op"),
        ({"options": {"variant": ["mean"]}}, "tune.options.variant"),
        ({"options": {"no_such": [1]}}, "tune.options.no_such"),
        ({"items": [ITEMS[0] | {"prompt": "long " * 20}]}, "tune.items.0"),
        ({"strengths": [8.0]}, "tune.strengths"),
    ],
)
def test_what_cannot_be_tuned_is_422_with_its_field_and_publishes_nothing(
    tmp_path: Path, tune: dict[str, Any], param: str
) -> None:
    engine = TunedEngine()
    with pytest.raises(ApiError) as refused:
        asyncio.run(run(tmp_path, engine, spec(**tune)))
    assert (refused.value.status, refused.value.param) == (422, param), refused.value.message
    with pytest.raises(ArtifactNotFound):
        Store(tmp_path / "store").versions("made")
    assert param == "tune.strengths" or engine.scored == 0, "found out before anything was measured"


def point(effect: float, strength: float = 1.0, fluent: bool = True, margin: float | None = None) -> TuningPoint:
    return TuningPoint(effect=effect, margin=margin, strength=strength, layers=[0], fluent=fluent)


def test_the_best_of_equal_points_is_the_most_certain_then_the_gentlest() -> None:
    assert best([point(0.5), point(0.9, fluent=False), point(0.6)]) == 2
    assert best([point(0.5, margin=1.0), point(0.5, margin=2.0)]) == 1
    assert best([point(0.5, -4.0), point(0.5, 2.0), point(0.5, 3.0)]) == 1
    assert best([point(0.5, fluent=False)]) is None


def test_text_that_perplexes_or_loops_is_not_fluent() -> None:
    baseline = Scores(effect=0.0, perplexity=10.0, distinct_2=0.8)
    for perplexity, distinct, fluent in ((20.0, 0.4, True), (20.1, 0.8, False), (2.0, 0.3, False)):
        assert is_fluent(Scores(effect=0.0, perplexity=perplexity, distinct_2=distinct), baseline, 2.0) is fluent
    assert not is_fluent(Scores(effect=0.0), baseline, 2.0)


def test_the_margin_is_over_the_best_of_the_wrong_choices(tmp_path: Path) -> None:
    item = ITEMS[0] | {"choices": [" maybe", RIGHT, WRONG], "answer": 1}
    tuning = asyncio.run(run(tmp_path, TunedEngine(), spec(items=[item], strengths=[1.0], layers=[[0]]))).tuning
    assert tuning.baseline.margin == pytest.approx(0.5 - 3.0 - (0.0 - 2.0))
    assert tuning.best.margin == pytest.approx(1.5 - 3.0 - (0.0 - 2.0))


def test_labels_are_scored_by_what_the_greedy_answer_says(tmp_path: Path) -> None:
    items = [{"prompt": "p", "label": label, "scorer": "contains", "split": "dev"} for label in ("ABC", "zzz")]
    tune = {"items": items, "strengths": [1.0], "objective": "accuracy"}
    tuning = asyncio.run(run(tmp_path, TunedEngine(), spec(**tune))).tuning
    assert (tuning.objective, tuning.best.effect, tuning.baseline.effect) == ("label_rate", 0.5, 0.5)
