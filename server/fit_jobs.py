"""Fit jobs: one at a time, kept in `<data-dir>/fits/`, taken up again after a restart.

Several processes may serve from one data directory. Each accepts, lists and cancels jobs, in the folder; one of them,
the holder of a lock, runs those of its model.
"""

from __future__ import annotations

import asyncio
import hashlib
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import structlog
from fastapi.concurrency import run_in_threadpool

from server import metrics
from server.api.errors import ApiError
from server.experts import FindExpert, no_expert
from server.fit_methods.base import MethodSpec
from server.fit_records import FitFolder, FitJob, FitRecord, Progress
from server.fits import run_fit
from server.locks import POLL_SECONDS, holding
from server.models import ModelIdentity
from steering_store import Publication, Store
from steering_store.errors import StoreError

if TYPE_CHECKING:
    from server.engine.client import Engine

log = structlog.get_logger()
ANNOTATION = "fit"
"""Names the job in the artifact, so that a job cut off after publishing isn't run twice."""


@dataclass
class _Running:
    job: FitJob
    progress: Progress
    task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        # Once: a second time would cut off the clean-up.
        if self.task is not None and not self.task.cancelling():
            self.task.cancel()


@dataclass
class FitJobs:
    """All jobs, oldest first. Belongs to one event loop; `start` it once the engine is up."""

    folder: Path
    engine: Engine
    store: Store
    identity: ModelIdentity
    expert: FindExpert = no_expert
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _running: _Running | None = None
    _worker: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._records = FitFolder(self.folder)
        self._model = self.identity["weights_digest"] or self.engine.model_name

    def start(self) -> None:
        """Go on with the unfinished jobs of earlier runs. ValueError where a record can't be read."""
        self._records.heads()
        self._worker = asyncio.create_task(self._work())

    async def submit(self, spec: MethodSpec) -> FitJob:
        """Accept a job; it is on disk when this returns."""
        job = FitJob(
            id=f"fit-{uuid.uuid4().hex[:16]}", name=spec.name, method=spec.method, created_at=datetime.now(UTC)
        )
        await run_in_threadpool(self._records.add, FitRecord(job=job, model=self._model, spec=spec))
        self._wake.set()
        return job

    def get(self, fit_id: str) -> FitJob:
        """Raises ApiError 404."""
        head = self._records.head(fit_id)
        if head is None:
            raise no_fit(fit_id)
        return self._now(head.job)

    def list(self) -> list[FitJob]:
        return [self._now(head.job) for head in self._records.heads()]

    async def cancel(self, fit_id: str) -> FitJob:
        """Stop a queued or running job. Raises ApiError 404, or 409 when it is over."""
        job = await run_in_threadpool(
            self._records.end, fit_id, lambda job: {"status": "cancelled", "progress": self._now(job).progress}
        )
        if job is None:
            raise ApiError(409, f"fit {fit_id} has {self.get(fit_id).status} already", "id")
        metrics.FITS.labels(job.method, "cancelled").inc()
        if self._running is not None and self._running.job.id == fit_id:
            self._running.cancel()
        return job

    def _now(self, job: FitJob) -> FitJob:
        """The job as it is: on disk, what this process runs is a little behind."""
        running = self._running
        if job.over or running is None or running.job.id != job.id:
            return job
        return job.model_copy(update={"status": "running", "progress": running.progress})

    async def _work(self) -> None:
        lock = self.folder / f"{hashlib.sha256(self._model.encode()).hexdigest()[:16]}.lock"
        while self.engine.alive:
            try:
                async with holding(lock):
                    await self._run_all()
            except Exception:  # a full disk, say: the jobs are kept, and go on when it has room again
                log.exception("fits can't go on")
                await asyncio.sleep(POLL_SECONDS)

    async def _run_all(self) -> None:
        """Run what is there and what comes, while the engine lives."""
        await run_in_threadpool(self._take_over)
        while self.engine.alive:
            self._wake.clear()
            job = await run_in_threadpool(self._next)
            if job is not None:
                await self._run(job)
                continue
            with suppress(TimeoutError):  # other processes can't wake this one
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    def _take_over(self) -> None:
        self._records.sweep()
        for job in self._mine():
            self._records.requeue(job.id)

    def _mine(self) -> Sequence[FitJob]:
        heads = self._records.heads()
        return [head.job for head in heads if not head.job.over and head.model in (self._model, None)]

    def _next(self) -> FitJob | None:
        return next(iter(self._mine()), None)

    async def _run(self, job: FitJob) -> None:
        """Run a job to its end, or until somebody cancels it."""
        running = self._running = _Running(job, Progress())
        task = running.task = asyncio.create_task(self._fit(running))
        try:
            while not task.done():
                if not await run_in_threadpool(self._records.report, job.id, running.progress):
                    running.cancel()
                await asyncio.wait([task], timeout=POLL_SECONDS)
        finally:
            running.cancel()
            self._running = None
        await run_in_threadpool(self._records.discard_work, job.id)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if self.engine.alive:
            await run_in_threadpool(self._fail, job, error)
            await run_in_threadpool(self._records.discard_work, job.id)
        else:
            await run_in_threadpool(self._records.requeue, job.id)  # the next start takes it up

    async def _fit(self, running: _Running) -> None:
        job = running.job
        commit = _Commit(self._records, self.store, running)
        if await run_in_threadpool(commit.published):
            return
        spec = await run_in_threadpool(self._records.spec, job.id)

        def progress(done: int, total: int) -> None:
            # A fit computes in a thread, which nothing but an exception ends.
            if running.task is not None and running.task.cancelling():
                raise _Withdrawn
            running.progress = Progress(done=done, total=total)

        await run_fit(
            spec,
            self.engine,
            cast(Store, commit),
            self.identity,
            job.created_at,
            progress,
            {ANNOTATION: job.id},
            work=self._records.work(job.id),
            expert=self.expert,
        )

    def _fail(self, job: FitJob, error: BaseException) -> None:
        if isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        expected = isinstance(error, ApiError | StoreError)
        message = str(error) if expected else f"internal error: {type(error).__name__}: {error}"
        if self._records.end(job.id, lambda job: {"status": "failed", "error": message}) is not None:
            metrics.FITS.labels(job.method, "failed").inc()
            log.error("fit failed", fit=job.id, error=message, exc_info=None if expected else error)


def no_fit(fit_id: str) -> ApiError:
    return ApiError(404, f"no fit {fit_id!r}; GET /v1/fits lists them", "id")


class _Withdrawn(Exception):
    """The job was cancelled before its artifact could be published."""


@dataclass
class _Commit:
    """Where a job publishes: the artifact and the job's end are one, so that a cancelled job publishes nothing."""

    records: FitFolder
    store: Store
    running: _Running

    def __getattr__(self, name: str) -> Any:
        """All that reads is the store's."""
        return getattr(self.store, name)

    def publish(self, name: str, manifest: Mapping[str, object], files: Mapping[str, bytes]) -> Publication:
        publications: list[Publication] = []

        def publish() -> str:
            publications.append(self.store.publish(name, manifest, files, by=f"fit {self.running.job.id}"))
            return publications[0].version.ref

        self._succeed(publish)
        return publications[0]

    def published(self) -> bool:
        """Whether the job had published when it was cut off; if so, it ends."""
        job = self.running.job
        version = self.store.annotated(job.name, ANNOTATION, job.id)
        if version is not None:
            self._succeed(lambda: version.ref)
        return version is not None

    def _succeed(self, artifact: Any) -> None:
        job = self.records.end(
            self.running.job.id,
            lambda job: {"status": "succeeded", "artifact": artifact(), "progress": self.running.progress},
        )
        if job is None:
            raise _Withdrawn
        metrics.FITS.labels(job.method, "succeeded").inc()
        log.info("fit succeeded", fit=job.id, artifact=job.artifact)
