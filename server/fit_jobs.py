"""Fit jobs: one at a time, kept in `<data-dir>/fits/`, taken up again after a restart."""

from __future__ import annotations

import asyncio
import os
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import structlog
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from server.api.errors import ApiError
from server.fits import FitSpec, run_fit
from server.models import ModelIdentity
from steering_store import Store
from steering_store.blobs import fsync
from steering_store.errors import ArtifactNotFound, StoreError

if TYPE_CHECKING:
    from server.engine.client import Engine

log = structlog.get_logger()
ANNOTATION = "fit"
"""Names the job in the artifact, so that a job cut off after publishing isn't run twice."""


class Progress(BaseModel):
    """Texts captured, of all."""

    done: int = 0
    total: int = 0


class FitJob(BaseModel):
    """A fit and how far it is. `artifact` is `name@version` once it is published."""

    id: str
    object: Literal["fit"] = "fit"
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"] = "queued"
    name: str
    method: str
    progress: Progress = Progress()
    artifact: str | None = None
    error: str | None = None
    created_at: datetime


class _Record(BaseModel):
    job: FitJob
    spec: FitSpec | None
    """None once the job is over: nobody needs the texts any more."""


@dataclass
class FitJobs:
    """All jobs by id, oldest first. Belongs to one event loop; `start` it once the engine is up."""

    folder: Path
    engine: Engine
    store: Store
    identity: ModelIdentity
    _records: dict[str, _Record] = field(default_factory=dict)
    _queue: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    _worker: asyncio.Task[None] | None = None
    _running: tuple[str, asyncio.Task[None]] | None = None

    def start(self) -> None:
        """Read the jobs of earlier runs and go on with the unfinished ones."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_behind in self.folder.glob("*.tmp"):
            left_behind.unlink()
        records = [_Record.model_validate_json(path.read_bytes()) for path in self.folder.glob("*.json")]
        for record in sorted(records, key=lambda record: record.job.created_at):
            self._records[record.job.id] = record
            if record.job.status in ("queued", "running"):
                record.job.status = "queued"
                self._queue.put_nowait(record.job.id)
        self._worker = asyncio.create_task(self._work())

    async def submit(self, spec: FitSpec) -> FitJob:
        """Accept a job; it is on disk when this returns."""
        job = FitJob(
            id=f"fit-{uuid.uuid4().hex[:16]}", name=spec.name, method=spec.method, created_at=datetime.now(UTC)
        )
        record = _Record(job=job, spec=spec)
        await run_in_threadpool(self._save, record)
        self._records[job.id] = record
        self._queue.put_nowait(job.id)
        return job

    def get(self, fit_id: str) -> FitJob:
        """Raises ApiError 404."""
        if fit_id not in self._records:
            raise ApiError(404, f"no fit {fit_id!r}; GET /v1/fits lists them", "id")
        return self._records[fit_id].job

    def list(self) -> list[FitJob]:
        return [record.job for record in self._records.values()]

    async def cancel(self, fit_id: str) -> FitJob:
        """Stop a queued or running job. Raises ApiError 404, or 409 when it is over."""
        job = self.get(fit_id)
        if job.status not in ("queued", "running"):
            raise ApiError(409, f"fit {fit_id} has {job.status} already", "id")
        if self._running is not None and self._running[0] == fit_id:
            self._running[1].cancel()
        job.status = "cancelled"
        await run_in_threadpool(self._save, self._records[fit_id])
        return job

    async def _work(self) -> None:
        while True:
            record = self._records[await self._queue.get()]
            if record.job.status != "queued":
                continue
            task = asyncio.create_task(self._run(record))
            self._running = (record.job.id, task)
            await asyncio.wait([task])
            self._running = None
            if not task.cancelled() and (error := task.exception()) is not None:
                if not self.engine.alive:
                    record.job.status = "queued"  # the next start takes it up
                    await run_in_threadpool(self._save, record)
                    return
                self._fail(record, error)
            record.spec = None
            await run_in_threadpool(self._save, record)

    async def _run(self, record: _Record) -> None:
        job, spec = record.job, record.spec
        assert spec is not None
        job.status = "running"
        published = await run_in_threadpool(self._published, job)
        if published is None:

            def progress(done: int, total: int) -> None:
                job.progress = Progress(done=done, total=total)

            annotations = {ANNOTATION: job.id}
            publication = await run_fit(
                spec, self.engine, self.store, self.identity, job.created_at, progress, annotations
            )
            published = publication.version.ref
        job.artifact, job.status = published, "succeeded"
        log.info("fit succeeded", fit=job.id, artifact=published)

    def _published(self, job: FitJob) -> str | None:
        try:
            versions = self.store.versions(job.name)
        except ArtifactNotFound:
            return None
        return next((v.ref for v in versions if v.manifest.annotations.get(ANNOTATION) == job.id), None)

    def _fail(self, record: _Record, error: BaseException) -> None:
        if isinstance(error, ExceptionGroup):
            error = error.exceptions[0]
        expected = isinstance(error, ApiError | StoreError)
        record.job.status = "failed"
        record.job.error = str(error) if expected else f"internal error: {type(error).__name__}: {error}"
        log.error("fit failed", fit=record.job.id, error=record.job.error, exc_info=None if expected else error)

    def _save(self, record: _Record) -> None:
        path = self.folder / f"{record.job.id}.json"
        # Its own name: a job that is cancelled is saved by its worker and by the request at the same time.
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        with temporary.open("wb") as file:
            file.write(record.model_dump_json().encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        fsync(self.folder)
