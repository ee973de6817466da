"""Fit jobs of several processes on one folder, without an engine."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from server import fit_jobs, locks
from server.api.errors import ApiError
from server.engine.capture import CaptureSpec
from server.engine.edits import POINTS
from server.fit_jobs import FitJobs
from server.fit_methods.caa import CaaSpec
from server.fit_methods.pairs import Pair
from server.fit_records import FitFolder
from server.models import ModelIdentity
from steering_store import Store
from steering_store.errors import ArtifactNotFound

LAYERS, HIDDEN = 2, 4
TEXTS = 4


def stored(array: Any) -> SimpleNamespace:
    return SimpleNamespace(numpy=lambda: array)


class FakeEngine:
    """Captures made-up activations, and nothing while `held`."""

    layers, hidden_size, max_model_len, heads = LAYERS, HIDDEN, 64, 2
    captures = None
    model_name, architecture, model_path = "fake", "FakeForCausalLM", "nowhere to be found"

    def __init__(self) -> None:
        self.alive = True
        self.points = {point: {"width": HIDDEN} for point in POINTS}
        self.captured = 0
        self.cut_off = 0
        self.go = asyncio.Event()
        self.go.set()

    async def tokenize(self, texts: list[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    async def run_capture(self, ids: list[int], spec: CaptureSpec, *, detokenize: bool) -> SimpleNamespace:
        self.captured += 1
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cut_off += 1
            raise
        if not self.alive:
            raise RuntimeError("the engine is dead")
        random = np.random.default_rng(ids)
        tensors = {}
        for point, layer in spec.sites:
            width = self.points[point]["width"]
            rows = random.standard_normal((len(ids), width)).astype(np.float32)
            tensors[f"{point}.{layer}"] = stored(rows if spec.keep == "rows" else rows[-1])
            tensors[f"{point}.{layer}.norm"] = stored(np.float32(1))
        return SimpleNamespace(tensors=tensors)


def identity(weights: str = "sha256:" + "a" * 64) -> ModelIdentity:
    return ModelIdentity(
        architecture="FakeForCausalLM",
        hidden_size=HIDDEN,
        num_layers=LAYERS,
        vocab_size=256,
        tokenizer_digest="sha256:" + "b" * 64,
        weights_digest=weights,
    )


def spec(name: str) -> CaaSpec:
    return CaaSpec(name=name, pairs=[Pair(positive=f"good {i}", negative=f"bad {i}") for i in range(TEXTS // 2)])


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fit_jobs, locks):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.05)


def jobs_of(root: Path, engine: FakeEngine, **changes: Any) -> FitJobs:
    """As of one process of its own: nothing of it is shared but the files."""
    fields = {"store": Store(root / "artifacts"), "identity": identity()} | changes
    return FitJobs(root / "fits", engine, **fields)  # type: ignore[arg-type]


@asynccontextmanager
async def started(*all_jobs: FitJobs) -> AsyncIterator[None]:
    """Started one after the other, so that the first one runs the jobs."""
    for jobs in all_jobs:
        jobs.start()
        await asyncio.sleep(0.02)
    try:
        yield
    finally:
        for jobs in all_jobs:
            await stopped(jobs)


async def stopped(jobs: FitJobs) -> None:
    assert jobs._worker is not None
    jobs._worker.cancel()
    await asyncio.wait([jobs._worker])


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it doesn't come true"
        await asyncio.sleep(0.01)


async def over(jobs: FitJobs, fit_id: str) -> str:
    await until(lambda: jobs.get(fit_id).over)
    return jobs.get(fit_id).status


def versions(jobs: FitJobs, name: str) -> int:
    try:
        return len(jobs.store.versions(name))
    except ArtifactNotFound:
        return 0


def test_one_process_runs_what_all_accept_once_each(tmp_path: Path) -> None:
    async def run() -> None:
        engines = [FakeEngine() for _ in range(3)]
        all_jobs = [jobs_of(tmp_path, engine) for engine in engines]
        async with started(*all_jobs):
            accepted = [await all_jobs[number % 3].submit(spec(f"fit-{number}")) for number in range(12)]
            for job in accepted:
                assert [await over(jobs, job.id) for jobs in all_jobs] == ["succeeded"] * 3
            lists = [jobs.list() for jobs in all_jobs]
            assert lists[0] == lists[1] == lists[2]
            assert [job.id for job in lists[0]] == [job.id for job in accepted]
            assert {job.progress.done for job in lists[0]} == {TEXTS}
            assert [versions(all_jobs[2], f"fit-{number}") for number in range(12)] == [1] * 12
            assert [engine.captured for engine in engines] == [12 * TEXTS, 0, 0]

    asyncio.run(run())


def test_a_running_job_shows_its_progress_to_others(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine()
        engine.go.clear()
        owner, other = jobs_of(tmp_path, engine), jobs_of(tmp_path, FakeEngine())
        async with started(owner, other):
            job = await other.submit(spec("watched"))
            await until(lambda: other.get(job.id).progress.total == TEXTS)
            assert other.get(job.id).status == owner.get(job.id).status == "running"
            engine.go.set()
            assert await over(other, job.id) == "succeeded"

    asyncio.run(run())


@pytest.mark.parametrize("by", ["owner", "other"])
def test_a_cancelled_job_stops_and_publishes_nothing(tmp_path: Path, by: str) -> None:
    async def run() -> None:
        engine = FakeEngine()
        engine.go.clear()
        owner, other = jobs_of(tmp_path, engine), jobs_of(tmp_path, FakeEngine())
        canceller = owner if by == "owner" else other
        async with started(owner, other):
            running, queued = [await other.submit(spec("cancelled")) for _ in range(2)]
            await until(lambda: other.get(running.id).status == "running" and engine.captured == TEXTS)
            for job in (queued, running):
                assert (await canceller.cancel(job.id)).status == "cancelled"
                assert [each.get(job.id).status for each in (owner, other)] == ["cancelled"] * 2
            await until(lambda: engine.cut_off == TEXTS)
            engine.go.set()
            last = await other.submit(spec("last"))
            assert await over(owner, last.id) == "succeeded"
            assert [each.get(job.id).status for each in (owner, other) for job in (running, queued)] == [
                "cancelled"
            ] * 4
            assert versions(owner, "cancelled") == 0
            for each in (owner, other):
                with pytest.raises(ApiError, match="cancelled already"):
                    await each.cancel(running.id)

    asyncio.run(run())


def test_a_cancellation_that_the_runner_has_not_seen_still_keeps_it_from_publishing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_jobs, "POLL_SECONDS", 60)

    async def run() -> None:
        engine = FakeEngine()
        engine.go.clear()
        owner, other = jobs_of(tmp_path, engine), jobs_of(tmp_path, FakeEngine())
        async with started(owner, other):
            job = await owner.submit(spec("late"))
            await until(lambda: engine.captured == TEXTS)
            await other.cancel(job.id)
            engine.go.set()
            await until(lambda: owner._running is None)
            assert engine.cut_off == 0
            assert (owner.get(job.id).status, versions(owner, "late")) == ("cancelled", 0)

    asyncio.run(run())


def test_a_job_that_is_publishing_can_no_longer_be_cancelled(tmp_path: Path) -> None:
    publishing, go = threading.Event(), threading.Event()

    class SlowStore(Store):
        def publish(self, *arguments: Any, **stated: Any) -> Any:
            publishing.set()
            assert go.wait(10)
            return super().publish(*arguments, **stated)

    async def run() -> None:
        owner = jobs_of(tmp_path, FakeEngine(), store=SlowStore(tmp_path / "artifacts"))
        other = jobs_of(tmp_path, FakeEngine())
        async with started(owner, other):
            job = await other.submit(spec("published"))
            await until(publishing.is_set)
            cancelling = asyncio.create_task(other.cancel(job.id))
            await asyncio.sleep(0.1)
            assert not cancelling.done()
            go.set()
            with pytest.raises(ApiError, match="succeeded already") as refused:
                await cancelling
            assert refused.value.status == 409
            assert other.get(job.id).artifact == "published@1"

    asyncio.run(run())


HOLDER = """
import asyncio, sys
from pathlib import Path
from tests.server.test_fit_jobs import FakeEngine, jobs_of, spec

async def run(root):
    engine = FakeEngine()
    engine.go.clear()
    jobs = jobs_of(root, engine)
    jobs.start()
    await jobs.submit(spec("inherited"))
    while engine.captured == 0:
        await asyncio.sleep(0.01)
    (root / "fits" / "half-written.tmp").write_text("{")
    print("running", flush=True)
    await asyncio.sleep(600)

asyncio.run(run(Path(sys.argv[1])))
"""


def test_another_process_takes_over_when_the_one_that_runs_the_jobs_is_killed(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "running\n"

            async def run() -> None:
                engine = FakeEngine()
                jobs = jobs_of(tmp_path, engine)
                async with started(jobs):
                    (job,) = jobs.list()
                    await until(lambda: jobs.get(job.id).status == "running")
                    await asyncio.sleep(0.3)
                    assert engine.captured == 0
                    holder.kill()
                    assert await over(jobs, job.id) == "succeeded"
                    assert (versions(jobs, "inherited"), engine.captured) == (1, TEXTS)
                    await until(lambda: {path.suffix for path in jobs.folder.iterdir()} == {".json", ".lock"})

            asyncio.run(run())
        finally:
            holder.kill()


def test_a_job_cut_off_after_publishing_is_not_run_again(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine()
        first = jobs_of(tmp_path, engine)
        async with started(first):
            job = await first.submit(spec("published"))
            record = (first.folder / f"{job.id}.json").read_bytes()
            assert await over(first, job.id) == "succeeded"
        (first.folder / f"{job.id}.json").write_bytes(record)  # as if the process had ended before it could write
        second = jobs_of(tmp_path, engine)
        async with started(second):
            assert await over(second, job.id) == "succeeded"
            assert second.get(job.id).artifact == "published@1"
            assert (versions(second, "published"), engine.captured) == (1, TEXTS)

    asyncio.run(run())


def test_a_stopped_process_leaves_its_job_queued(tmp_path: Path) -> None:
    async def run() -> None:
        engine = FakeEngine()
        engine.go.clear()
        jobs = jobs_of(tmp_path, engine)
        async with started(jobs):
            job = await jobs.submit(spec("stopped"))
            await until(lambda: engine.captured == TEXTS)
        record = json.loads((jobs.folder / f"{job.id}.json").read_text())
        assert (record["job"]["status"], len(record["spec"]["pairs"])) == ("queued", TEXTS // 2)

    asyncio.run(run())


def test_a_dead_engine_leaves_its_job_to_another_process(tmp_path: Path) -> None:
    async def run() -> None:
        dying = FakeEngine()
        dying.go.clear()
        owner, other = jobs_of(tmp_path, dying), jobs_of(tmp_path, FakeEngine())
        async with started(owner, other):
            job = await owner.submit(spec("moved"))
            await until(lambda: dying.captured == TEXTS)
            dying.alive = False
            dying.go.set()
            assert await over(other, job.id) == "succeeded"
            assert other.get(job.id).error is None

    asyncio.run(run())


def test_a_disk_that_was_full_for_a_while_loses_no_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end = FitFolder.end
    failures = iter([OSError("No space left on device")] * 2)

    def sometimes(self: FitFolder, *arguments: Any) -> Any:
        if (failure := next(failures, None)) is not None:
            raise failure
        return end(self, *arguments)

    async def run() -> None:
        jobs = jobs_of(tmp_path, FakeEngine())
        async with started(jobs):
            monkeypatch.setattr(FitFolder, "end", sometimes)  # the artifact's publication, and then the job's failure
            job = await jobs.submit(spec("patient"))
            assert await over(jobs, job.id) == "succeeded"
            assert versions(jobs, "patient") == 1

    asyncio.run(run())


def test_jobs_are_run_on_the_model_that_they_were_accepted_for(tmp_path: Path) -> None:
    async def run() -> None:
        engines = [FakeEngine(), FakeEngine()]
        here = jobs_of(tmp_path, engines[0])
        there = jobs_of(tmp_path, engines[1], identity=identity("sha256:" + "c" * 64))
        async with started(here):
            foreign = await there.submit(spec("there"))
            own = await here.submit(spec("here"))
            assert await over(here, own.id) == "succeeded"
            assert here.get(foreign.id).status == "queued"
            async with started(there):
                assert await over(here, foreign.id) == "succeeded"
        assert [engine.captured for engine in engines] == [TEXTS, TEXTS]
        digest = here.store.resolve("there").manifest.model.weights_digest
        assert digest == "sha256:" + "c" * 64

    asyncio.run(run())


def test_a_failed_job_says_why_in_every_process(tmp_path: Path) -> None:
    async def run() -> None:
        owner, other = jobs_of(tmp_path, FakeEngine()), jobs_of(tmp_path, FakeEngine())
        async with started(owner, other):
            same = CaaSpec(name="zero", pairs=[Pair(positive="same", negative="same")] * 2)
            job = await other.submit(same)
            assert await over(other, job.id) == "failed"
            assert "don't differ" in str(other.get(job.id).error)

    asyncio.run(run())


@pytest.mark.parametrize("fit_id", ["fit-0123456789abcdef", "", "..", "\0", "fit-0123456789abcdef\n", "x" * 5000])
def test_unknown_jobs_are_404(tmp_path: Path, fit_id: str) -> None:
    jobs = jobs_of(tmp_path, asyncio.run(made()))
    with pytest.raises(ApiError) as refused:
        jobs.get(fit_id)
    assert refused.value.status == 404
    with pytest.raises(ApiError) as refused:
        asyncio.run(jobs.cancel(fit_id))
    assert refused.value.status == 404


async def made() -> FakeEngine:
    return FakeEngine()
