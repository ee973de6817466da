"""`/v1/fits`: fit an artifact on the served model, as a job with progress."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel

from server.api.errors import ApiError, EnvelopeRoute
from server.fit_jobs import FitJob, FitJobs
from server.fits import FitSpec, tokenize
from steering_store.reference import check_name

router = APIRouter(prefix="/v1/fits", tags=["fits"], route_class=EnvelopeRoute)


class FitList(BaseModel):
    """Every job, oldest first."""

    object: Literal["list"] = "list"
    data: list[FitJob]


def _jobs(request: Request) -> FitJobs:
    return request.app.state.polyhelm.fits


Jobs = Annotated[FitJobs, Depends(_jobs)]


@router.post("", status_code=202)
async def create_fit(spec: FitSpec, request: Request, response: Response, jobs: Jobs) -> FitJob:
    """Accept a fit. Poll `Location` until `status` is succeeded, failed or cancelled."""
    most = request.app.state.polyhelm.settings.max_fit_pairs
    if len(spec.pairs) > most:
        raise ApiError(413, f"{len(spec.pairs)} pairs: at most {most} are accepted", "pairs")
    check_name(spec.name)
    layers = jobs.engine.layers
    if bad := [layer for layer in spec.options.default_layers or () if layer >= layers]:
        raise ApiError(422, f"default_layers {bad} are outside the model's {layers} layers", "options.default_layers")
    await tokenize(spec, jobs.engine)
    job = await jobs.submit(spec)
    response.headers["Location"] = f"/v1/fits/{job.id}"
    return job


@router.get("")
async def list_fits(jobs: Jobs) -> FitList:
    return FitList(data=jobs.list())


@router.get("/{fit_id}")
async def get_fit(fit_id: str, jobs: Jobs) -> FitJob:
    return jobs.get(fit_id)


@router.delete("/{fit_id}")
async def cancel_fit(fit_id: str, jobs: Jobs) -> FitJob:
    """Stop a queued or running job; 409 when it is over."""
    return await jobs.cancel(fit_id)
