"""Fit jobs on disk: `<data-dir>/fits/`, which all processes that serve from one data directory share.

<id>.json      a `FitRecord`
<id>.progress  how far the process is that runs the job; gone when the job is over
<id>.work/     what another attempt at the job goes on from; gone when the job is over
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from server.fit_methods.base import MethodSpec
from server.fit_methods.registry import FitSpec
from server.locks import locked
from steering_store.blobs import fsync

ID = re.compile(r"fit-[0-9a-f]{16}")
Stamp = tuple[int, int, int]


class Progress(BaseModel):
    """Of the step that is under way: texts captured, steps of a training, or points of a sweep, of all."""

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

    @property
    def over(self) -> bool:
        return self.status not in ("queued", "running")


class FitHead(BaseModel):
    """What is read of a record to tell about its job.

    `model` names the weights to fit on; None in records from before several servers could share a folder.
    """

    job: FitJob
    model: str | None = None


class FitRecord(FitHead):
    """A job as it is on disk."""

    spec: FitSpec | None
    """None once the job is over: nobody needs the texts any more."""


class FitFolder:
    """The records in a folder. Safe to use from several threads and processes: all that write hold one lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._known: dict[str, tuple[Stamp, FitHead]] = {}
        path.mkdir(parents=True, exist_ok=True)

    def heads(self) -> list[FitHead]:
        """Of all jobs, oldest first. Reads what has changed since the last time."""
        names = (path.stem for path in self.path.glob("fit-*.json"))
        heads = [head for name in names if (head := self.head(name)) is not None]
        return sorted(heads, key=lambda head: head.job.created_at)

    def head(self, fit_id: str) -> FitHead | None:
        """None where there is no such job."""
        if not ID.fullmatch(fit_id):
            return None
        try:
            head = self._read(fit_id)
        except FileNotFoundError:
            self._known.pop(fit_id, None)
            return None
        if head.job.over:
            return head
        try:
            progress = Progress.model_validate_json(self._progress(fit_id).read_bytes())
        except FileNotFoundError:
            return head
        job = head.job.model_copy(update={"status": "running", "progress": progress})
        return FitHead(job=job, model=head.model)

    def spec(self, fit_id: str) -> MethodSpec:
        """Of a job that isn't over."""
        spec = FitRecord.model_validate_json(self._record(fit_id).read_bytes()).spec
        assert spec is not None
        return spec

    def add(self, record: FitRecord) -> None:
        """Keep a new job; it is on disk when this returns."""
        with self._locked():
            self._save(record)

    def end(self, fit_id: str, changes: Callable[[FitJob], dict[str, Any]]) -> FitJob | None:
        """End a job: `changes` are the fields of the job that do. None, and nothing is done, where it is over or gone.

        Nobody else ends the job while `changes` is under way, so what it does belongs to the job's end. Where it
        raises, the job goes on.
        """
        with self._locked():
            head = self.head(fit_id)
            if head is None or head.job.over:
                return None
            job = head.job.model_copy(update=changes(head.job))
            self._save(FitRecord(job=job, model=head.model, spec=None))
            self._progress(fit_id).unlink(missing_ok=True)
            return job

    def work(self, fit_id: str) -> Path:
        """A folder of the job's own, which may not be there."""
        return self.path / f"{fit_id}.work"

    def report(self, fit_id: str, progress: Progress) -> bool:
        """Tell how far a running job is; False where somebody ended it."""
        with self._locked():
            head = self.head(fit_id)
            if head is None or head.job.over:
                return False
            self._replace(self._progress(fit_id), progress.model_dump_json())
            return True

    def discard_work(self, fit_id: str) -> None:
        """Remove what only another attempt would need, where the job is over."""
        head, work = self.head(fit_id), self.work(fit_id)
        if work.exists() and (head is None or head.job.over):
            shutil.rmtree(work)

    def requeue(self, fit_id: str) -> None:
        """Nobody runs the job any more."""
        self._progress(fit_id).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove what writers left behind that are gone."""
        with self._locked():
            for left_behind in self.path.glob("*.tmp"):
                left_behind.unlink()
            for progress in self.path.glob("*.progress"):
                head = self.head(progress.stem)
                if head is None or head.job.over:
                    progress.unlink()
            for work in self.path.glob("*.work"):
                head = self.head(work.stem)
                if head is None or head.job.over:
                    shutil.rmtree(work)

    def _locked(self) -> Any:
        return locked(self.path / "writers.lock")

    def _record(self, fit_id: str) -> Path:
        return self.path / f"{fit_id}.json"

    def _progress(self, fit_id: str) -> Path:
        return self.path / f"{fit_id}.progress"

    def _read(self, fit_id: str) -> FitHead:
        path = self._record(fit_id)
        found = path.stat()
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        known = self._known.get(fit_id)
        if known is None or known[0] != stamp:
            # A newer file than the stamp's is read again the next time.
            known = self._known[fit_id] = (stamp, FitHead.model_validate_json(path.read_bytes()))
        return known[1]

    def _save(self, record: FitRecord) -> None:
        self._replace(self._record(record.job.id), record.model_dump_json(), durable=True)

    def _replace(self, path: Path, text: str, *, durable: bool = False) -> None:
        temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        with temporary.open("wb") as file:
            file.write(text.encode())
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.rename(path)
        if durable:
            fsync(self.path)
