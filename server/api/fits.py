"""`/v1/fits`: fit an artifact on the served model, as a job with progress."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel

from server.api.errors import ApiError, EnvelopeRoute
from server.fit_jobs import FitJob, FitJobs, no_fit
from server.fit_methods.registry import FitSpec, untagged
from server.fits import check_spec
from server.request_context import current
from server.tenants import check_owned, visible
from steering_store.reference import check_name


class _Untagged(APIRoute):
    """A body that is one of several classes: its errors are told by the fields that the user wrote."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def untagging(request: Request) -> Response:
            try:
                return await handler(request)
            except RequestValidationError as error:
                errors = [untagged(each, depth=1) for each in error.errors()]
                raise RequestValidationError(errors, body=error.body) from error

        return untagging


class _Route(EnvelopeRoute, _Untagged):
    pass


router = APIRouter(prefix="/v1/fits", tags=["fits"], route_class=_Route)


class FitList(BaseModel):
    """Every job, oldest first."""

    object: Literal["list"] = "list"
    data: list[FitJob]


def _jobs(request: Request) -> FitJobs:
    return request.app.state.polyhelm.fits


Jobs = Annotated[FitJobs, Depends(_jobs)]


@router.post("", operation_id="create_fit", status_code=202)
async def create_fit(spec: FitSpec, request: Request, response: Response, jobs: Jobs) -> FitJob:
    """Accept a fit. Poll `Location` until `status` is succeeded, failed or cancelled."""
    most = request.app.state.polyhelm.settings.max_fit_pairs
    if len(spec.items) > most:
        field = spec.data_field
        raise ApiError(413, f"{len(spec.items)} {field}: at most {most} are accepted (POLYHELM_MAX_FIT_PAIRS)", field)
    check_owned(check_name(spec.name))
    await check_spec(spec, jobs.engine)
    job = await jobs.submit(spec)
    response.headers["Location"] = f"/v1/fits/{job.id}"
    return job


@router.get("", operation_id="list_fits")
async def list_fits(jobs: Jobs) -> FitList:
    tenant = current().key.tenant
    return FitList(data=[job for job in jobs.list() if visible(job.name, tenant)])


@router.get("/{fit_id}", operation_id="get_fit")
async def get_fit(fit_id: str, jobs: Jobs) -> FitJob:
    return _visible(jobs.get(fit_id))


@router.delete("/{fit_id}", operation_id="cancel_fit")
async def cancel_fit(fit_id: str, jobs: Jobs) -> FitJob:
    """Stop a queued or running job; 409 when it is over."""
    check_owned(_visible(jobs.get(fit_id)).name, "id")
    return await jobs.cancel(fit_id)


def _visible(job: FitJob) -> FitJob:
    if not visible(job.name, current().key.tenant):
        raise no_fit(job.id)
    return job
