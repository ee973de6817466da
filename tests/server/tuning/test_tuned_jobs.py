"""Jobs that take long: tuned ones and trainings, over the death of an engine and their own cancellation."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from methods import sae_training
from server import fit_jobs, locks
from server.fit_methods.registry import parse_spec
from tests.server.fit_methods.test_sae import LAYER, TRAINING, Atomic, passages
from tests.server.test_fit_jobs import jobs_of, over, started, until, versions
from tests.server.tuning.test_sweep import ITEMS, TunedEngine, spec


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fit_jobs, locks):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.05)


class Dying(TunedEngine):
    """Dies in the middle of a sweep."""

    async def log_probs(self, *arguments: Any) -> list[float]:
        if self.scored >= 20:
            self.alive = False
            raise RuntimeError("the engine is dead")
        return await super().log_probs(*arguments)


def test_a_sweep_goes_on_at_the_next_start_where_the_engine_died(tmp_path: Path) -> None:
    async def run() -> None:
        first, second = Dying(), TunedEngine()
        jobs = jobs_of(tmp_path, first)
        async with started(jobs):
            job = await jobs.submit(spec())
            await until(lambda: not first.alive and jobs._running is None)
        work = tmp_path / "fits" / f"{job.id}.work"
        assert jobs.get(job.id).status == "queued" and (work / "tuning.jsonl").exists()
        measured = len((work / "tuning.jsonl").read_text().splitlines()) - 1
        again = jobs_of(tmp_path, second)
        async with started(again):
            assert await over(again, job.id) == "succeeded"
            assert second.scored == len(ITEMS) * 3 * (5 - measured) and 0 < measured < 5
            await until(lambda: not work.exists())
        assert again.store.resolve("made").manifest.default_strength == 4.0

    asyncio.run(run())


def test_a_training_ends_soon_when_its_job_is_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    advance, steps = sae_training._Run.advance, []

    def slow(run: Any) -> None:
        steps.append(run.step)
        time.sleep(0.005)
        advance(run)

    monkeypatch.setattr(sae_training._Run, "advance", slow)

    async def run() -> None:
        jobs = jobs_of(tmp_path, Atomic())
        options = TRAINING | {"layer": LAYER, "steps": 100_000}
        async with started(jobs):
            job = await jobs.submit(
                parse_spec({"method": "sae", "name": "long", "texts": passages(20), "options": options})
            )
            await until(lambda: len(steps) > 5)
            assert (await jobs.cancel(job.id)).status == "cancelled"
            work = tmp_path / "fits" / f"{job.id}.work"
            await until(lambda: jobs._running is None and not work.exists())
            done = len(steps)
            await asyncio.sleep(0.1)
            assert len(steps) == done and versions(jobs, "long") == 0

    asyncio.run(run())


def test_what_a_failed_job_kept_is_removed(tmp_path: Path) -> None:
    async def run() -> None:
        jobs = jobs_of(tmp_path, TunedEngine())
        async with started(jobs):
            job = await jobs.submit(spec(strengths=[8.0]))
            assert await over(jobs, job.id) == "failed"
            assert "name smaller strengths" in (jobs.get(job.id).error or "")
            await until(lambda: not (tmp_path / "fits" / f"{job.id}.work").exists())

    asyncio.run(run())
